"""scripts/install and scripts/sanitize in a checkout whose path holds a space, their programs replaced by stand-ins.

On machines that it cannot serve, scripts/install says so before anything is made.
"""

import os
import re
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


def run(checkout: Path, command: list[str], stand_ins: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """A script for a user whose programs are `stand_ins`, name → shell script, before those of this machine."""
    programs = checkout.parent / "bin"
    programs.mkdir(exist_ok=True)
    for name, script in stand_ins.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    environ.pop("PYTHON", None)
    return subprocess.run(
        [checkout / "scripts" / command[0], *command[1:]],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout.parent,
    )


def install(checkout: Path, stand_ins: dict[str, str]) -> str:
    """What is said where nothing can be installed."""
    done = run(checkout, ["install"], stand_ins)
    assert done.returncode == 1, done.stderr
    assert not (checkout / ".venv" / "installed-serve").exists()
    return done.stderr


def test_another_system_is_named(checkout: Path) -> None:
    said = install(checkout, {"uname": "echo Darwin", "sha256sum": "exit 127"})
    assert said == "[install] needs Linux, and this is Darwin: use a Linux container or virtual machine.\n"


def test_a_python_that_is_too_old_is_named(checkout: Path) -> None:
    said = install(checkout, {"python3": "exit 1"})
    assert said.startswith("[install] python3 is not Python 3.11 to 3.13")


def test_a_python_without_venv_is_told_the_package(checkout: Path) -> None:
    said = install(checkout, {"python3": 'case "$2" in venv) exit 1;; esac'})
    assert said.endswith("[install] no .venv could be made; on Debian or Ubuntu: apt-get install python3-venv\n")


@pytest.mark.parametrize(("what", "files"), [("serve", "cpu demo"), ("dev", "cpu dev demo")])
def test_what_is_asked_is_installed_and_compiled_once(checkout: Path, what: str, files: str) -> None:
    stand_ins = {
        "made": f'echo "$@" >> "{checkout}/said"',
        "python3": f'case "$2" in venv) mkdir -p .venv/bin && cp "{checkout.parent}/bin/made" .venv/bin/python;; esac',
    }
    done = run(checkout, ["install", what], stand_ins)
    assert done.returncode == 0, done.stderr
    said = (checkout / "said").read_text()
    assert re.findall(r"-r requirements-(.*)\.txt", said) == files.split()
    assert said.count("import") == 1 + 1, "Python's version is asked for, then kernels are compiled"
    for held in (what, "serve"):
        again = run(checkout, ["install", held], {})
        assert again.stderr == "" and (checkout / "said").read_text() == said


# A compiler that looks for what it is to read, and makes programs that say what they are told.
COMPILER = """
case $1 in -print-file-name=*) exit ;; esac
while [ $# -gt 0 ]; do
  case $1 in
    -o) printf '#!/bin/sh\\necho ran "$@"\\n' > "$2" && chmod +x "$2" && shift ;;
    -I) [ -d "$2" ] && shift || exit 1 ;;
    -*) ;;
    *) [ -e "$1" ] || { echo "no file $1" >&2; exit 1; } ;;
  esac
  shift
done
"""


def test_the_sanitizers_programs_are_built_and_run(checkout: Path) -> None:
    for folder in ("starling/model/ops/cpu/native", "tests/native"):
        shutil.copytree(ROOT / folder, checkout / folder)
    stand_ins = {"c++": COMPILER, "python3": ":", "uname": "echo x86_64"}
    done = run(checkout, ["sanitize"], stand_ins)
    assert done.returncode == 0, done.stderr
    sets = ["avx512vnni", "avx512", "avxvnni", "avx2", "portable"]
    assert done.stdout.splitlines() == [f"ran {name}" for name in sets] * 2
