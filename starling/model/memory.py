"""How much memory is really free: for this process, on this device."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from starling.errors import DeviceError
from starling.model.config import ModelConfig
from starling.model.control_groups import limiting_groups

# Of the memory that is free once the weights are loaded, the KV cache takes at most this share on a CPU, where other
# processes need some too; on a GPU, all but what steps and their captured graphs need: attention's scratch (141 MB on
# an H100), sampling's tables (50 MB), the graphs' activations (90 MB for 256 sequences), the partial sums that thread
# blocks of a linear share (67 MB), the kernels, and a margin.
CPU_SHARE = 0.5
GPU_RESERVE_BYTES = 1 << 30


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated. On a CPU the container's own limit counts, not only the machine's.

    Cached files count as free, since the system evicts them, except those that this process maps, as the weights.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    groups = (limit - used + cached for limit, used, cached in _groups())
    return max(0, min([psutil.virtual_memory().available, *groups]) - _mapped_bytes())


def kv_cache_budget(device: torch.device, step_bytes: int) -> int:
    """Bytes that the KV cache takes by default, once the weights are loaded. `step_bytes`: as in `kv_cache_room`."""
    return kv_cache_room(device, step_bytes) if device.type == "cuda" else int(free_bytes(device) * CPU_SHARE)


def kv_cache_room(device: torch.device, step_bytes: int) -> int:
    """Bytes that the KV cache can hold at most, once the weights are loaded.

    On a GPU, all that steps leave; `step_bytes` are the activations of the largest. On a CPU, what a control group
    already uses is not subtracted: whoever asks for so much may know that it will be freed.
    """
    if device.type == "cuda":
        return max(0, free_bytes(device) - GPU_RESERVE_BYTES - step_bytes)
    return min([psutil.virtual_memory().available, *(limit for limit, _, _ in _groups())])


def activation_bytes(config: ModelConfig, tokens: int) -> int:
    """The most that a step of `tokens` tokens holds on a GPU: 100 KB for each of Starling's.

    The residual stream in float32; in fp16 its norm, q|k|v, attention's output, and the activation between gate|up and
    down twice: Python frees one layer's only once the next one's takes its name.
    """
    qkv = config.q_size + 2 * config.kv_size
    halves = config.hidden_size + qkv + config.q_size + 2 * config.intermediate_size
    return tokens * (4 * config.hidden_size + 2 * halves)


def finish_loading(device: torch.device) -> None:
    """Wait for the GPU work that loading queued, and free what only loading needed: 0.8 of 5.0 GB for Starling."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def check_fits(free: int, weights: int, cache: int) -> None:
    """All in bytes, of a GPU. Raises DeviceError when `free` is less than these two plus what steps need."""
    needed = weights + cache + GPU_RESERVE_BYTES
    if free < needed:
        gb = [f"{size / 1e9:.2f} GB" for size in (free, weights, cache, GPU_RESERVE_BYTES, needed)]
        raise DeviceError(
            f"The GPU has {gb[0]} free. The weights take {gb[1]}, one request's KV cache {gb[2]}, steps {gb[3]}: "
            f"{gb[4]} in all. Use a larger GPU, or stop whatever else uses its memory (`nvidia-smi` lists it)."
        )


def _groups() -> Iterator[tuple[int, int, int]]:
    """Limit, usage, and cached files within it, in bytes, of this process's control group and of each one above it."""
    for version, folder in limiting_groups("memory"):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        try:
            limit, used = ((folder / name).read_text().strip() for name in names)
        except OSError:
            continue
        if limit != "max":
            yield int(limit), int(used), _cached_bytes(folder, "" if version == 2 else "total_")


def _cached_bytes(group: Path, prefix: str) -> int:
    """Of files, in a group; 0 where it does not say, so that its limit still holds."""
    try:
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def _mapped_bytes() -> int:
    return int(psutil.Process().memory_info().shared)
