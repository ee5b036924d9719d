"""Bytes of a file → a GPU's memory, through two pinned buffers: one is filled while the other is copied to the GPU."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from starling.model.reading import fill

BUFFER_BYTES = 32 << 20
# One thread copies about 9 GB/s out of the page cache, less than a bus to a GPU carries; two or more fill it.
PART_BYTES = 8 << 20  # read by one thread
THREADS = 4


class Staging:
    """Reads tensors from files onto `device`. pread leaves no mapping behind, which would take time to unmap.

    On a CPU, where nothing needs pinning, the same steps run without overlapping.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES, part_bytes: int = PART_BYTES) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._part_bytes = part_bytes
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in self._buffers] if self._cuda else []  # type: ignore[no-untyped-call]
        self._turn = 0
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="staging")

    def tensor(self, path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor whose bytes begin at `offset` of `path`. Raises OSError, also if the file ends too early."""
        whole = torch.empty(shape, dtype=dtype, device=self._device)
        target = whole.view(-1).view(torch.uint8)
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < target.numel():
                buffer = self._buffers[self._turn]
                if self._cuda:
                    self._copied[self._turn].synchronize()
                wanted = min(buffer.numel(), target.numel() - done)
                self._read(file.fileno(), offset + done, memoryview(buffer.numpy().data)[:wanted])
                target[done : done + wanted].copy_(buffer[:wanted], non_blocking=True)
                if self._cuda:
                    self._copied[self._turn].record()
                self._turn = 1 - self._turn
                done += wanted
        return whole

    def _read(self, file: int, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset` on, in parts read in parallel."""

        def read_part(begin: int) -> None:
            fill(into[begin : begin + self._part_bytes], file, offset + begin)

        parts = range(0, len(into), self._part_bytes)
        if len(parts) == 1:
            read_part(0)
        else:
            list(self._pool.map(read_part, parts))  # raises what a part raised
