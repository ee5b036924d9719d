"""Reads bytes of a file into memory."""

import os
from pathlib import Path

import torch


def fill(target: memoryview, file: int, offset: int) -> None:
    """Fill `target` from byte `offset` of `file`. Raises OSError, also if the file ends too early."""
    done = 0
    while done < len(target):
        read = os.preadv(file, [target[done:]], offset + done)
        if not read:
            raise OSError(f"the file has become shorter: it ends at byte {offset + done}")
        done += read


def read_tensor(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor whose bytes begin at `offset` of `path`. Raises OSError, also if the file ends too early.

    Not mapped: touching a mapped block that the disk cannot read, or that is gone, would kill the process with SIGBUS.
    """
    whole = torch.empty(shape, dtype=dtype)
    with path.open("rb", buffering=0) as file:
        fill(memoryview(whole.numpy().data).cast("B"), file.fileno(), offset)
    return whole
