"""Memory in 2 MiB pages: for new tensors, and for a mapped file, whose bytes move there while they are being read.

The page cache holds a file in whatever pages it was read or written with: 4 KiB on most file systems. Mapped from
those, a decode step of 7B on two cores took 153 ms; from 2 MiB pages it takes 128, because prefetching stops at the end
of a page. Copying the file at startup would cost seconds; so it is mapped, used at once, and moved piece by piece
underneath its readers, at the same addresses. This needs Linux 5.7; before that, the mapping stays as it is.
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
PIECE_BYTES = 64 << 20  # moved in one step
NICENESS = 10  # computation goes first: on a busy core this leaves the move about a tenth of the time
THREAD = "huge-pages"
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Like torch.empty, but on a CPU in huge pages if available. Memory is only taken up as it is first written."""
    if device.type != "cpu" or not _available():
        return torch.empty(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    memory = mmap.mmap(-1, count * dtype.itemsize + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    # The tensor owns the mapping, and frees it.
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=_aligned(begin) - begin).view(shape)


def move_to_huge_pages(mapped: mmap.mmap, file: int, piece_bytes: int = PIECE_BYTES) -> threading.Thread | None:
    """Start moving `mapped`, a private mapping of the whole open `file` that nobody writes to.

    The thread ends when it is done, or logs why it stopped. None if there are no huge pages, so that moving would cost
    memory and gain nothing; if the file is smaller than one; or if there is not enough free memory for a second copy.
    """
    if not _available() or len(mapped) < HUGE_BYTES or free_bytes(torch.device("cpu")) < len(mapped):
        return None
    thread = threading.Thread(target=_move, args=(mapped, os.dup(file), piece_bytes), name=THREAD, daemon=True)
    thread.start()
    return thread


def wait_for_moves() -> None:
    """Wait until every move has ended: for benchmarks and tests."""
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
                # Atomic for other threads: one that is reading there waits, and then finds the same bytes.
                _remap(start, size, address)
    except OSError as error:
        log.info("Not all of the weights moved to huge pages: %s.", error)
    finally:
        os.close(file)


def _available() -> bool:
    """Whether the system gives out 2 MiB pages on request: it may give none, or larger ones (arm64: 512 MiB)."""
    try:
        enabled, size = ((SYSTEM / name).read_text() for name in ("enabled", "hpage_pmd_size"))
    except OSError:
        return False
    return "[never]" not in enabled and int(size) == HUGE_BYTES


def _aligned(address: int) -> int:
    return -(-address // HUGE_BYTES) * HUGE_BYTES


def _remap(source: int, size: int, target: int) -> None:
    """Move the pages at `source` to `target`, leaving fresh ones at `source`. Raises OSError."""
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
