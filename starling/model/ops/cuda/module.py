"""A compiled .cu file and the arguments that its kernels take; the driver and the tests' emulator implement it."""

from typing import Protocol

import torch

# A tensor is passed as its address, None as a null pointer, an int as int32, a float as float32.
Argument = torch.Tensor | int | float | None
Grid = tuple[int, int, int]


class Module(Protocol):
    def launch(self, kernel: str, grid: Grid, threads: int, shared_bytes: int, *arguments: Argument) -> None:
        """Queue `kernel` over `grid` blocks of `threads` threads on torch's current stream; returns at once.

        Tensors must be contiguous, on the module's device, and stay alive until the kernel has run; for tensors of the
        same stream, torch's allocator guarantees the last. Raises DeviceError.
        """
        ...
