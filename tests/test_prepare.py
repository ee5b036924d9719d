"""`python -m starling prepare` on a CPU: it leaves what later starts on any machine look for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from starling.__main__ import main
from starling.errors import WeightsError
from starling.model.ops.cpu import compiler
from starling.model.ops.reference import ReferenceOps
from starling.settings import Settings


def test_kernels_of_every_instruction_set_are_compiled_and_weights_repacked(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = unpacked(demo_folder, tmp_path)
    parts = ["context", "isa", *compiler._instruction_sets()]
    compiled = dict(zip(parts, compiler.library_paths(*parts), strict=True))

    def copy(compiler: object, part: str, path: Path) -> None:  # instead of half a minute of compiling
        shutil.copy(compiled[part], path)

    monkeypatch.setattr(compiler, "_compile", copy)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # this user's own may hold compiled kernels
    monkeypatch.setenv("STARLING_DEVICE", "cpu")
    monkeypatch.setenv("STARLING_WEIGHTS", str(weights))
    assert main(["prepare"]) == 0
    assert f"Weights: {weights}, repacked." in capsys.readouterr().out
    assert list(weights.glob("packed-*"))
    assert {path.name for path in (tmp_path / ".cache/starling").glob("*.so")} == {p.name for p in compiled.values()}


def test_without_a_compiler_weights_are_repacked_for_plain_torch(demo_folder: Path, tmp_path: Path) -> None:
    weights = unpacked(demo_folder, tmp_path)
    folders = dict.fromkeys(("HOME", "TMPDIR"), str(tmp_path))  # so that this user's compiled kernels are not found
    environment = {"PATH": "", "STARLING_DEVICE": "cpu", "STARLING_WEIGHTS": str(weights), **folders}
    command = [sys.executable, "-m", "starling", "prepare"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "Operations: torch-cpu on cpu." in done.stdout and "several times slower" in done.stderr
    assert list(weights.glob("packed-torch-cpu-*"))


@pytest.mark.parametrize(
    ("environment", "code"), [({}, 0), ({"STARLING_WEIGHTS": "/absent"}, 1), ({"STARLING_ALLOW_DOWNLOAD": "1"}, 1)]
)
def test_missing_weights_are_an_error_only_if_named_or_to_be_downloaded(
    environment: dict[str, str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere(settings: Settings) -> None:
        raise WeightsError("There are none.")

    monkeypatch.setattr("starling.prepare.locate_weights", nowhere)
    monkeypatch.setenv("STARLING_DEVICE", "cpu")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["prepare"]) == code
    screen = capsys.readouterr()
    assert (screen.err.endswith("There are none.\n"), "There are no weights" in screen.out) == (code == 1, code == 0)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "\nStopped.\n"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device\n"),
    ],
)
def test_an_abort_is_reported_in_one_line(
    fault: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_ahead() -> None:
        raise fault

    monkeypatch.setattr("starling.model.ops.cpu.compiler.compile_ahead", compile_ahead)
    monkeypatch.setenv("STARLING_DEVICE", "cpu")
    assert main(["prepare"]) == code
    assert capsys.readouterr().err == said


def test_devices_that_keep_no_repacked_weights_read_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a GPU that "auto" has found; here the oracle stands in for it."""
    monkeypatch.setattr("starling.model.ops.choose_ops", lambda *_: ReferenceOps())
    monkeypatch.setattr("starling.model.ops.cpu.compiler.compile_ahead", lambda: None)
    monkeypatch.setattr("starling.prepare.locate_weights", lambda settings: pytest.fail("weights were looked for"))
    assert main(["prepare"]) == 0
    assert capsys.readouterr().out.endswith("Operations: reference on cpu.\n")


def unpacked(demo_folder: Path, parent: Path) -> Path:
    return Path(shutil.copytree(demo_folder, parent / "demo", ignore=shutil.ignore_patterns("packed-*")))
