"""How much memory is really free: for this process, on this device."""

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated. On a CPU the container's own limit counts, not only the machine's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return min(psutil.virtual_memory().available, _cgroup_free_bytes(CGROUP))


def _cgroup_free_bytes(root: Path) -> int:
    """What control groups leave: version 2's memory.max, else version 1's memory.limit_in_bytes."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (root / limit_name).read_text().strip(), (root / used_name).read_text().strip()
        except OSError:
            continue
        return 2**63 if limit == "max" else max(0, int(limit) - int(used))
    return 2**63
