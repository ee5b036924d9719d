"""What a device did and when, from torch's profiler: time per kernel, and the time between kernels."""

import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.clock import Clock

DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # of the profiler's categories
HOST_WORK = ("cpu_op",)
STEP_BEGINS = "Memcpy HtoD"  # a step's inputs arrive in one copy
MAX_NAME_CHARS = 56


@dataclass(frozen=True)
class Activity:
    name: str
    begin_us: float
    duration_us: float

    @property
    def end_us(self) -> float:
        return self.begin_us + self.duration_us


def recorded(work: Callable[[], object], clock: Clock) -> list[Activity]:
    """What the device did for `work`, in order of start; on a CPU, torch's operations."""
    cuda = clock.device.type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    # Newer profilers tear CUPTI down after a profile by default. That happens late, so the next profile may come out
    # empty; and with CUDA before 12.6, graphs crashed.
    os.environ["TEARDOWN_CUPTI"] = "0"
    # There is only one cycle, but torch 2.11 warns that earlier ones' events are lost unless it is told to keep them.
    with torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU], acc_events=True) as profile:
        work()
        clock.wait()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return activities(events, DEVICE_WORK if cuda else HOST_WORK)


def activities(events: list[dict[str, Any]], categories: tuple[str, ...] = DEVICE_WORK) -> list[Activity]:
    """Those in a Chrome trace."""
    found = [
        Activity(_name(event), float(event["ts"]), float(event["dur"]))
        for event in events
        if event.get("cat") in categories
    ]
    return sorted(found, key=lambda activity: activity.begin_us)


def by_kernel(found: list[Activity], steps: int) -> list[tuple[str, float, float]]:
    """(name, launches per step, µs per step), the longest first."""
    spent: dict[str, list[float]] = defaultdict(list)
    for activity in found:
        spent[activity.name].append(activity.duration_us)
    rows = [(name, len(each) / steps, sum(each) / steps) for name, each in spent.items()]
    return sorted(rows, key=lambda row: -row[2])


@dataclass(frozen=True)
class Idle:
    """µs per step in which the device did nothing."""

    within: float  # between the activities of a step
    between: float  # from a step's last activity to the next one's first
    steps: int


def idle(found: list[Activity]) -> Idle:
    """A step begins with the copy of its inputs; whatever precedes the first is ignored."""
    within = between = 0.0
    steps = 0
    end_us: float | None = None
    for activity in found:
        begins = activity.name.startswith(STEP_BEGINS)
        if end_us is None and not begins:
            continue
        gap = max(0.0, activity.begin_us - end_us) if end_us is not None else 0.0
        steps += begins
        if begins:
            between += gap
        else:
            within += gap
        end_us = max(end_us or 0.0, activity.end_us)
    return Idle(within / max(1, steps), between / max(1, steps - 1), steps)


def _name(event: dict[str, Any]) -> str:
    """A kernel's name without C++ decoration, and its grid, which tells a kernel's matrices apart."""
    name = re.sub(r"<.*|\(anonymous namespace\)::|^void |\bat::native::", "", str(event["name"]))
    name = name.split("(")[0] if event["cat"] == "kernel" else str(event["name"]).split(" (")[0]
    grid = event.get("args", {}).get("grid")
    return name[:MAX_NAME_CHARS] + (f" [{' x '.join(map(str, grid))}]" if grid else "")
