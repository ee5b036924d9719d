"""The start-up report: one line of JSON that says what is running and how long each part took to start."""

import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from starling import __version__
from starling.settings import Settings
from starling.weights import Located

logger = logging.getLogger(__name__)

PACKAGES = ("cog", "coglet", "torch", "tokenizers", "safetensors", "llguidance")
MAY_HOLD_SECRETS = {"weights_source"}  # a mirror's address can carry a password


class Startup:
    """A stopwatch with named laps. The first, "imports", began with the process."""

    def __init__(self) -> None:
        self.began_s = process_began_s()
        self.laps_s: dict[str, float] = {"imports": time.time() - self.began_s}
        self.operations = "reference"  # that engine has its own; for ours: "NAME on DEVICE"

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        began_s = time.monotonic()
        yield
        self.laps_s[name] = time.monotonic() - began_s

    def report(self, located: Located, settings: Settings, occupancy: dict[str, int]) -> None:
        """Log what is running: versions, device, weights, settings, and seconds per lap."""
        line = {
            "event": "start",
            "versions": {"starling": __version__, "python": platform.python_version()} | versions(),
            "operations": self.operations,
            "processor": processor(),
            "weights": str(located.folder),
            "weights_origin": located.origin,
            "weights_sha256": located.model_sha256,
            "stand_in": located.stand_in,  # true: the demo's small model, not Starling
            "settings": shown(settings),
            **occupancy,
            "process_began": round(self.began_s, 3),
            "seconds": {name: round(seconds, 3) for name, seconds in self.laps_s.items()},
        }
        logger.info("%s", json.dumps(line))


def process_began_s() -> float:
    """When this process began: seconds since the epoch, to a hundredth.

    psutil's create_time counts from a boot time truncated to whole seconds, so it is up to a second early.
    """
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    since_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime, the 22nd field of proc(5)
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s)


def versions() -> dict[str, str]:
    """Versions of the packages that determine what is answered and how, if installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The CPU's name as the kernel reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()


def shown(settings: Settings) -> dict[str, Any]:
    """Environment variable → value, except where None lets the server choose; secrets are hidden."""
    values = settings.model_dump(mode="json", exclude_none=True)
    fields = type(settings).model_fields
    return {str(fields[name].alias): "(set)" if name in MAY_HOLD_SECRETS else value for name, value in values.items()}
