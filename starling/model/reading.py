"""Bytes of a file into memory."""

import os
from pathlib import Path

import torch


def fill(target: memoryview, file: int, offset: int) -> int:
    """Read into `target` from `offset` on, until it is full or the file ends; how many bytes came. Raises OSError."""
    done = 0
    while done < len(target) and (read := os.preadv(file, [target[done:]], offset + done)):
        done += read
    return done


def read_tensor(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor whose bytes begin at `offset` of `path`. Raises OSError, also where the file ends too early.

    Not mapped: a mapped block that the disk cannot read, or that is there no more, ends the process with SIGBUS.
    """
    whole = torch.empty(shape, dtype=dtype)
    with path.open("rb", buffering=0) as file:
        read = fill(memoryview(whole.numpy().data).cast("B"), file.fileno(), offset)
    if read < whole.nbytes:
        raise OSError(f"{path} ends at byte {offset + read}, in the middle of a tensor")
    return whole
