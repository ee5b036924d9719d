"""The command lines as a user sees them; the search itself needs AutoAWQ and is tested in test_layerwise.py."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from starling.__main__ import main
from starling.errors import INSTALL_REFERENCE, StarlingError

ROOT = Path(__file__).parents[2]


def quantizing(monkeypatch: pytest.MonkeyPatch, search: Callable[..., Any] | None) -> None:
    """Replace layerwise.py's search by `search`; None: as if the packages that it imports were not installed."""
    module = None if search is None else SimpleNamespace(quantize=search)
    monkeypatch.setitem(sys.modules, "starling.quantize.layerwise", module)  # type: ignore[arg-type]


def test_the_arguments_reach_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    quantizing(monkeypatch, lambda *arguments: asked.extend(arguments))
    (tmp_path / "text").write_text("héllo", encoding="utf-8")
    sizes = ["--group-size", "64", "--samples", "9", "--length", "7"]
    assert main(["quantize", "from", "to", "--calibration", str(tmp_path / "text"), *sizes]) == 0
    assert asked == [Path("from"), Path("to"), "héllo", 64, 9, 7]
    assert capsys.readouterr().out == "to\n"


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (StarlingError("no such thing"), 1, "no such thing"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (KeyboardInterrupt(), 130, "resumes after the last finished layer"),
    ],
)
def test_an_error_is_reported_in_one_line(
    fault: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def search(*arguments: object) -> None:
        raise fault

    quantizing(monkeypatch, search)
    assert main(["quantize", "from", "to"]) == code
    assert message in capsys.readouterr().err


def test_an_unreadable_calibration_text_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantizing(monkeypatch, pytest.fail)
    (tmp_path / "latin").write_bytes(b"h\xe9llo")
    for name in ("latin", "absent"):
        assert main(["quantize", "from", "to", "--calibration", str(tmp_path / name)]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_without_autoawq_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantizing(monkeypatch, None)
    assert main(["quantize", "from", "to"]) == 1
    assert INSTALL_REFERENCE in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "out", "err"),
    [("--help", "usage: ", ""), ("--work=weights", "", f" is not installed. {INSTALL_REFERENCE}\n")],
)
def test_the_demo_scales_command_without_autoawq(tmp_path: Path, option: str, out: str, err: str) -> None:
    module = "starling.quantize.demo_scales"
    start = f"import runpy, sys; sys.modules['awq'] = None; runpy.run_module({module!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", start, option]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if err else 0)
    assert done.stdout.startswith(out) and done.stderr.endswith(err) and done.stderr.count("\n") == err.count("\n")
    assert not list(tmp_path.iterdir()), "nothing was made first"
