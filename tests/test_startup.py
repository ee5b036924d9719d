"""The start-up report."""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from starling import startup
from starling.settings import Settings
from starling.startup import Startup, processor, versions
from starling.weights import Located

ROOT = Path(__file__).parent.parent
TICK_S = 0.01  # the resolution at which the kernel records a process's start


def test_a_process_s_start_time_is_when_it_was_spawned() -> None:
    code = """
from pathlib import Path
Path("/proc/self/comm").write_text("a) b")  # stands before the time, in brackets
from starling.startup import process_began_s
print(process_began_s())
"""
    before_s = time.time()
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        after_s = time.time()
        began_s = float(process.communicate()[0])
    assert before_s - 2 * TICK_S <= began_s <= after_s + 2 * TICK_S


def test_a_lap_is_as_long_as_what_is_inside() -> None:
    start = Startup()
    assert 0 < start.laps_s["imports"] < time.time() - start.began_s
    before_s = time.monotonic()
    with start.lap("weights"):
        began_s = time.monotonic()
        while (inside_s := time.monotonic() - began_s) == 0:
            pass
    assert inside_s <= start.laps_s["weights"] <= time.monotonic() - before_s


def test_the_report_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starling.startup.processor", lambda: "Abacus (2 cores)")
    caplog.set_level("INFO", logger="starling")
    start = Startup()
    start.laps_s["weights"] = 1.23456
    settings = Settings(weights=tmp_path, weights_source="https://user:secret@mirror.example", threads=3)
    start.report(Located(tmp_path, "baked", "f00d"), settings, {"kv_blocks": 7})
    line = json.loads(caplog.records[-1].message)
    assert {"cog", "coglet", "torch", "tokenizers", "safetensors", "llguidance"} <= line["versions"].keys()
    assert line["versions"]["python"] == platform.python_version()
    said = {name: value for name, value in line.items() if name not in ("versions", "settings")}
    assert said == {
        "event": "start",
        "operations": "reference",
        "processor": "Abacus (2 cores)",
        "weights": str(tmp_path),
        "weights_origin": "baked",
        "weights_sha256": "f00d",
        "stand_in": False,
        "kv_blocks": 7,
        "process_began": round(start.began_s, 3),
        "seconds": {"imports": round(start.laps_s["imports"], 3), "weights": 1.235},
    }
    shown = line["settings"]
    assert (shown["STARLING_THREADS"], shown["STARLING_WEIGHTS_SOURCE"]) == (3, "(set)")
    assert "STARLING_KV_CACHE_BYTES" not in shown, "the server chooses"


def test_a_package_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "PACKAGES", ("torch", "no-such-package", "safetensors"))
    assert list(versions()) == ["torch", "safetensors"]


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("model name\t: A: 1\nflags\t: x\n\nmodel name\t: A: 1\n", "A: 1 (2 cores)"),
        ("CPU part\t: 0xd40\n", platform.machine()),  # as ARM's kernels report
        (None, platform.machine()),
    ],
)
def test_the_processor_s_name(cpuinfo: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(startup, "Path", lambda path: tmp_path / Path(path).name)
    assert processor() == name
