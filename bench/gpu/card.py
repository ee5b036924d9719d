"""What this machine is, and its measured ceilings: the speed of its memory and of its tensor cores."""

from dataclasses import dataclass

import torch

from bench.gpu.clock import Clock
from starling.model.ops.cuda import nvrtc
from starling.model.ops.cuda.driver import driver_version
from starling.startup import processor

BANDWIDTH_BYTES = 2 << 30
MATRIX = 8192


@dataclass(frozen=True)
class Ceilings:
    copy: float  # bytes per s, read and written, of a large copy from the device to itself
    read: float  # bytes per s, of large reductions
    tensor: float  # floating-point operations per s, of a large fp16 matrix product

    @property
    def bandwidth(self) -> float:
        """What floors are computed with: the faster of the two."""
        return max(self.copy, self.read)


def measure(clock: Clock, size: int = BANDWIDTH_BYTES, matrix: int = MATRIX) -> Ceilings:
    copy, read = _bandwidths(clock, size)
    return Ceilings(copy, read, _tensor_rate(clock, matrix))


def _bandwidths(clock: Clock, size: int) -> tuple[float, float]:
    """For `size` bytes of random values, far more than any cache holds: copying, reading."""
    source, target = (torch.rand(size // 4, device=clock.device) for _ in range(2))
    copy_s = clock.median(lambda: target.copy_(source))
    read_s = min(clock.median(source.sum), clock.median(lambda: torch.dot(source, target)) / 2)
    return 2 * size / copy_s, size / read_s


def _tensor_rate(clock: Clock, matrix: int) -> float:
    a, b = (torch.randn(matrix, matrix, dtype=torch.float16, device=clock.device) for _ in range(2))
    return 2 * matrix**3 / clock.median(lambda: a @ b)


def description(device: torch.device) -> str:
    """The card and the versions that matter, on one line."""
    found = [f"torch {torch.__version__}", f"NVRTC {nvrtc.version()}", processor()]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found = [
            properties.name,
            f"sm_{properties.major}{properties.minor}",
            f"{properties.multi_processor_count} multiprocessors",
            f"{properties.total_memory / 1e9:.1f} GB",
            f"L2 {l2_bytes(device) / 1e6:.0f} MB",
            f"CUDA driver {_driver_name()}",
            *found,
        ]
    return ", ".join(found)


def l2_bytes(device: torch.device) -> int:
    """Of the last-level cache, where a weight could stay; 0 where there is no GPU."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def _driver_name() -> str:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:  # noqa: PTH123 - procfs
            words = file.readline().split()
        return next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, StopIteration):
        version = driver_version()
        return f"for CUDA {version // 1000}.{version % 1000 // 10}"
