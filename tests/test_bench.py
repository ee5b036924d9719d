"""A benchmark's command line reports a fault in one line, before it makes or loads anything."""

import subprocess
import sys
from pathlib import Path

import pytest

from starling.errors import INSTALL_REFERENCE

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "package"), [("parity", "transformers"), ("parity", "accelerate"), ("compare", "transformers")]
)
def test_a_missing_package_of_the_reference_is_reported(tmp_path: Path, name: str, package: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    start = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_module('bench.{name}', run_name='__main__')"
    command = [sys.executable, "-c", start, "--weights", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr == f"{package} is not installed. {INSTALL_REFERENCE}\n"


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("engine --weights /absent", "'/absent' is not a checkpoint folder"),
        ("host --weights /absent", "'/absent' is not a checkpoint folder"),
        ("startup --weights /absent", "'/absent' is not a checkpoint folder"),
        ("compare --weights {folder} --rounds 0", "'0' is not a whole number of 1 or more"),
        ("load --concurrency 0", "'0' is not a whole number of 1 or more"),
        ("load --url http://127.0.0.1:port", "not a valid address: Invalid port"),
        ("cpu --folder {folder} --peers-python /absent", "'/absent' is not an executable program"),
        ("cpu --folder {folder} --isa foo", "Instruction set 'foo' is not available"),
        ("engine --weights {folder}", "describes a model that is not implemented"),
    ],
)
def test_faults_are_reported_in_one_line(tmp_path: Path, command: str, fault: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    name, *arguments = command.format(folder=tmp_path).split()
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert fault in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
