"""A compiled .cu file, and what can be handed to its kernels. The driver offers one; so does the tests' emulator."""

from typing import Protocol

import torch

# A tensor goes as its address, None as a null pointer, an int as int32, a float as float32.
Argument = torch.Tensor | int | float | None
Grid = tuple[int, int, int]


class Module(Protocol):
    def launch(self, kernel: str, grid: Grid, threads: int, shared_bytes: int, *arguments: Argument) -> None:
        """Queue `kernel` over `grid` blocks of `threads` threads on torch's current stream; returns at once.

        Tensors must be contiguous, on the module's device, and live until the kernel has run, which torch's allocator
        sees to for tensors of the same stream. Raises DeviceError.
        """
        ...
