"""How many threads this process should compute with: the cores that it really has."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from starling.model.control_groups import limiting_groups

TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Physical cores within the process's affinity and its control groups' quotas, at least 1.

    Two hyperthreads of a core count as one: they share the execution units that these kernels saturate. A fraction
    of a core counts as a whole one: two threads that are throttled a quarter of the time do more than one.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = len({_siblings(cpu) for cpu in allowed})
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas())]))


def _siblings(cpu: int) -> str:
    """A name for the physical core that `cpu` belongs to."""
    try:
        return (TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quotas() -> Iterator[float]:
    """The CPU time, in cores, that each limiting control group allows this process."""
    for version, folder in limiting_groups("cpu"):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        except OSError:
            continue
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)
