"""Memory in pages of 2 MiB: for new tensors, and for a mapped file's bytes, which move there while they are being read.

The page cache holds a file in whatever pages it was read or written by: of 4 KiB on most file systems. Through a
mapping of those a decode step of 7B on two cores took 153 ms where it takes 128 in pages of 2 MiB, because fetching
ahead stops at the end of a page. A copy made at the start would cost seconds; so the file is mapped, used at once, and
replaced piece by piece under its readers' eyes, at the same addresses. Linux 5.7 and later can; else the mapping stays.
"""

import ctypes
import logging
import math
import mmap
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from starling.model.memory import free_bytes
from starling.model.reading import fill

log = logging.getLogger(__name__)

SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
HUGE_BYTES = 2 << 20
PIECE_BYTES = 64 << 20  # replaced at once
NICENESS = 10  # who computes goes first: a tenth of a busy core is left for this
THREAD = "huge-pages"
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As torch.empty; on a CPU in huge pages, where they are given. Memory is taken as it is first written."""
    if device.type != "cpu" or not _offered():
        return torch.empty(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    memory = mmap.mmap(-1, count * dtype.itemsize + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    # The tensor holds the mapping, and frees it.
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=_aligned(begin) - begin).view(shape)


def move_to_huge_pages(mapped: mmap.mmap, file: int, piece_bytes: int = PIECE_BYTES) -> threading.Thread | None:
    """Begin to replace `mapped`, a private mapping of all of the open `file` that nobody writes to.

    The thread ends when it is done, or logs why it stopped. None where there are no huge pages, which would cost memory
    and give nothing; where the file fills none; or where memory is short: as much again must be free.
    """
    if not _offered() or len(mapped) < HUGE_BYTES or free_bytes(torch.device("cpu")) < len(mapped):
        return None
    thread = threading.Thread(target=_move, args=(mapped, os.dup(file), piece_bytes), name=THREAD, daemon=True)
    thread.start()
    return thread


def wait_for_moves() -> None:
    """Until all that were begun have ended: for who measures."""
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()


def _move(mapped: mmap.mmap, file: int, piece_bytes: int) -> None:
    begin = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    first, end = _aligned(begin), (begin + len(mapped)) // HUGE_BYTES * HUGE_BYTES
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        with mmap.mmap(-1, piece_bytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as spare:
            spare.madvise(mmap.MADV_HUGEPAGE)
            start = _aligned(ctypes.addressof(ctypes.c_char.from_buffer(spare)))
            for address in range(first, end, piece_bytes):
                size = min(piece_bytes, end - address)
                piece = memoryview((ctypes.c_char * size).from_address(start)).cast("B")
                fill(piece, file, address - begin)
                # In one step for every other thread: one that reads there now waits, and then finds the same bytes.
                _remap(start, size, address)
    except OSError as error:
        log.info("Weights stay as the page cache holds them: %s.", error)
    finally:
        os.close(file)


def _offered() -> bool:
    """Whether the system gives pages of 2 MiB to who asks: it may not at all, or have larger ones (arm64: 512 MiB)."""
    try:
        enabled, size = ((SYSTEM / name).read_text() for name in ("enabled", "hpage_pmd_size"))
    except OSError:
        return False
    return "[never]" not in enabled and int(size) == HUGE_BYTES


def _aligned(address: int) -> int:
    return -(-address // HUGE_BYTES) * HUGE_BYTES


def _remap(source: int, size: int, target: int) -> None:
    """The pages of `source` lie at `target` from now on, and fresh ones at `source`. Raises OSError."""
    flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
    if _mremap()(source, size, size, flags, target) == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, f"mremap: {os.strerror(error)}")


@lru_cache(maxsize=1)
def _mremap() -> "ctypes._FuncPointer":
    function = ctypes.CDLL(None, use_errno=True).mremap
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    function.restype = ctypes.c_void_p
    return function
