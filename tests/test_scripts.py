"""scripts/install on machines that it cannot serve: it says so, in a path with a space, before anything is made."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    checkout = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, checkout)
    return checkout


def install(checkout: Path, stand_ins: dict[str, str]) -> str:
    """What is said to a user whose programs are `stand_ins`, name → shell script, before those of this machine."""
    programs = checkout.parent / "bin"
    programs.mkdir()
    for name, script in stand_ins.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    environ.pop("PYTHON", None)
    done = subprocess.run(
        [checkout / "scripts" / "install"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout.parent,
    )
    assert done.returncode == 1, done.stderr
    assert not (checkout / ".venv" / "installed-serve").exists()
    return done.stderr


def test_another_system_is_named(checkout: Path) -> None:
    said = install(checkout, {"uname": "echo Darwin", "sha256sum": "exit 127"})
    assert said == "[install] needs Linux, and this is Darwin: use a Linux container or virtual machine.\n"


def test_a_python_that_is_too_old_is_named(checkout: Path) -> None:
    said = install(checkout, {"python3": "exit 1"})
    assert said.startswith("[install] python3 is not Python 3.10 to 3.13")


def test_a_python_without_venv_is_told_the_package(checkout: Path) -> None:
    said = install(checkout, {"python3": 'case "$2" in venv) exit 1;; esac'})
    assert said.endswith("[install] no .venv could be made; on Debian or Ubuntu: apt-get install python3-venv\n")
