"""Bytes of a file → a GPU's memory, by two pinned buffers: one is filled from the file while the other is copied."""

import os
from pathlib import Path

import torch

BUFFER_BYTES = 32 << 20


class Staging:
    """Reads tensors from files onto `device`. Reading with pread leaves no mapping behind, whose end would take time.

    On a CPU, where nothing needs pinning, the same steps run without overlapping.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in self._buffers] if self._cuda else []  # type: ignore[no-untyped-call]
        self._turn = 0

    def tensor(self, path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor whose bytes begin at `offset` of `path`. Raises OSError, also where the file ends too early."""
        whole = torch.empty(shape, dtype=dtype, device=self._device)
        target = whole.view(-1).view(torch.uint8)
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < target.numel():
                buffer = self._buffers[self._turn]
                if self._cuda:
                    self._copied[self._turn].synchronize()
                wanted = min(buffer.numel(), target.numel() - done)
                read = os.preadv(file.fileno(), [memoryview(buffer.numpy().data)[:wanted]], offset + done)
                if read == 0:
                    raise OSError(f"{path} ends at byte {offset + done}, in the middle of a tensor")
                target[done : done + read].copy_(buffer[:read], non_blocking=True)
                if self._cuda:
                    self._copied[self._turn].record()
                self._turn = 1 - self._turn
                done += read
        return whole
