"""Repacked weights in a file: made once per checkpoint and layout, then mapped into memory at every start.

The file, all little-endian:
    tensors   each at a multiple of 64 bytes
    index     JSON: the key, and per weight its tensors' dtypes, shapes, offsets and checksums
    footer    magic, offset and length of the index, its SHA-256
The footer comes last, so a truncated file has none. A tensor's checksum covers the first 4 KiB of each MiB, and the
last 4 KiB: enough to detect blocks that a crash lost, and read in 10 ms, where reading everything takes seconds.
"""

import errno
import fcntl
import hashlib
import json
import logging
import math
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from starling.file_system import free_disk_bytes
from starling.model.huge_pages import move_to_huge_pages
from starling.model.ops import Packed

log = logging.getLogger(__name__)

FORMAT = 1  # version of the file format; part of the key
MAGIC = b"starpack"
FOOTER = struct.Struct("<8sQQ32s")
ALIGNMENT = 64  # a cache line
SAMPLED_BYTES, SAMPLE_EVERY_BYTES = 4096, 1 << 20
KEY_SAMPLES = 16  # of each of a checkpoint's files
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
)}  # fmt: skip
MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it

Weights = dict[str, Packed]


class UnusableError(Exception):
    """A cache file is another checkpoint's, or damaged. The message says which; never leaves this module."""


def default_folders(checkpoint: Path) -> tuple[Path, ...]:
    """Where repacked weights are kept: beside the checkpoint, or if that is not writable, in the user's cache."""
    try:
        return checkpoint, Path.home() / ".cache" / "starling"
    except RuntimeError:  # no HOME, and a user unknown to the system
        return (checkpoint,)


def load_or_make(
    checkpoint: Path, layout: str, repack: Callable[[], Iterable[tuple[str, Packed]]], folders: Sequence[Path]
) -> Weights:
    """The weights that `repack` yields, mapped from the first of `folders` that has them or can store them.

    `repack` yields named weights; each is read once. If no folder is writable, they stay in memory. Processes that
    start together repack once; one that is killed leaves nothing that could pass for a complete file.
    """
    key, paths = _key(checkpoint, layout), [_path(folder, checkpoint, layout) for folder in folders]
    for path in paths:
        found = _open(path, key)
        if found is not None:
            return found
    for path in paths:
        try:
            return _make(path, key, repack, _size(checkpoint))
        except OSError as error:
            log.info("Repacked weights cannot be kept in %s: %s.", path.parent, error)
    log.warning("No folder could take the repacked weights, so every start repacks: %s.", ", ".join(map(str, folders)))
    return dict(repack())


def _key(checkpoint: Path, layout: str) -> str:
    """Changes whenever the input of repacking does: headers, sizes and times of the files, config.json, the layout.

    Times count in whole seconds: image layers keep no more (containerd's archive/tar.go). A change within one second
    shows in samples of the weights: those of another model or another quantization differ everywhere.
    """
    digest = hashlib.sha256(f"{FORMAT} {layout}".encode())
    digest.update((checkpoint / "config.json").read_bytes())
    for path in sorted(checkpoint.glob("*.safetensors")):
        stat = path.stat()
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            digest.update(f"\0{path.name} {stat.st_size} {stat.st_mtime_ns // 10**9}\0".encode() + file.read(length))
            begin = file.tell()
            for i in range(KEY_SAMPLES):
                file.seek(begin + (stat.st_size - begin) * i // KEY_SAMPLES)
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


def _path(folder: Path, checkpoint: Path, layout: str) -> Path:
    """One file per checkpoint folder and layout, so that repacking new weights replaces the file of the old ones.

    Beside the checkpoint, the name does not depend on where that is mounted; elsewhere a hash of the checkpoint's path
    keeps checkpoints apart. Files of other layouts stay: a server of another version may have one mapped, and on a
    network file system would lose it.
    """
    if folder.resolve() == checkpoint.resolve():
        return folder / f"packed-{layout}.bin"
    return folder / f"packed-{hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:8]}-{layout}.bin"


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def _open(path: Path, key: str, level: int = logging.WARNING) -> Weights | None:
    """The weights in `path`, mapped; None if it is not a usable file. If it exists at all, the log says why."""
    try:
        return _map(path, key)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (UnusableError, OSError) as error:
        log.log(level, "%s cannot be used (%s): the weights are repacked.", path, error)
        return None


def _map(path: Path, key: str) -> Weights:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < FOOTER.size:
            raise UnusableError(f"{size} bytes are too few for a weight cache")
        # A private mapping: torch wants writable memory, and anything it wrote would stay in this process.
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        weights = _weights(mapped, key)
        move_to_huge_pages(mapped, file.fileno())
    return weights


def _weights(mapped: mmap.mmap, key: str) -> Weights:
    # Loads the whole file at once: 20 ms if it is in the page cache, at the disk's full speed if not. Without this, the
    # first token would stall at every 64 KiB.
    try:
        mapped.madvise(MADV_POPULATE_READ)
    except OSError as error:
        if error.errno == errno.EFAULT:  # touching that block would kill the process with SIGBUS
            raise UnusableError("a block of it cannot be read") from error
    size = len(mapped)
    magic, offset, length, digest = FOOTER.unpack_from(mapped, size - FOOTER.size)
    if magic != MAGIC or offset + length + FOOTER.size != size:
        raise UnusableError("it is truncated, or is something else")
    index_bytes = mapped[offset : offset + length]
    if hashlib.sha256(index_bytes).digest() != digest:
        raise UnusableError("its index is damaged")
    index = json.loads(index_bytes)
    if index["key"] != key:
        raise UnusableError("it was made from another checkpoint, or by another version")
    whole = torch.frombuffer(mapped, dtype=torch.uint8)
    weights: Weights = {}
    for name, parts in index["weights"].items():
        weight = {}
        for part, (dtype, shape, start, checksum) in parts.items():
            end = start + math.prod(shape) * DTYPES[dtype].itemsize
            if _checksum(memoryview(mapped)[start:end]) != checksum:
                raise UnusableError(f"{name} is damaged")
            weight[part] = whole[start:end].view(DTYPES[dtype]).view(shape)
        weights[name] = weight
    return weights


def _make(path: Path, key: str, repack: Callable[[], Iterable[tuple[str, Packed]]], expected_bytes: int) -> Weights:
    """Write `path` and map it. Raises OSError when it cannot be written there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _unfinished(path) as file:
        found = _open(path, key, logging.DEBUG)  # made by another process while this one waited
        if found is not None:
            return found
        free = free_disk_bytes(path.parent)
        if free < expected_bytes:
            raise OSError(errno.ENOSPC, f"{free / 1e9:.2f} GB free, about {expected_bytes / 1e9:.2f} GB needed")
        started = time.monotonic()
        log.info("Repacking the weights into %s (once).", path)
        _write(file, key, repack())
        os.fsync(file.fileno())
        Path(file.name).replace(path)
        log.info("Repacked the weights in %.1f s.", time.monotonic() - started)
    made = _open(path, key)
    if made is None:
        raise OSError(errno.EIO, f"{path} does not read back as it was written")
    return made


@contextmanager
def _unfinished(path: Path) -> Iterator[BinaryIO]:
    """The file that will become `path`: open, empty, and locked. Other processes wait here; dead ones hold no lock.

    It is deleted at the end unless it was renamed. Raises OSError, also if the file system does not support locks: a
    process on another machine could then replace the file that this one has mapped.
    """
    partial = path.with_name(f"{path.name}.partial")
    while True:
        with partial.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_same_file(partial, file):
                continue  # its last owner renamed or removed it: open the new one, which another process may hold
            file.truncate(0)
            try:
                yield file
            finally:
                if _is_same_file(partial, file):  # and it is not another process's by now
                    partial.unlink()
            return


def _is_same_file(path: Path, file: BinaryIO) -> bool:
    """Whether `path` names the open `file`."""
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _write(file: BinaryIO, key: str, weights: Iterable[tuple[str, Packed]]) -> None:
    index: dict[str, dict[str, tuple[str, list[int], int, int]]] = {}
    offset = 0
    for name, weight in _one_ahead(weights):
        index[name] = {}
        for part, tensor in weight.items():
            content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            data = memoryview(content.numpy().data)
            dtype = str(tensor.dtype).removeprefix("torch.")
            index[name][part] = (dtype, list(tensor.shape), offset, _checksum(data))
            padding = -len(data) % ALIGNMENT
            file.write(data)
            file.write(bytes(padding))
            offset += len(data) + padding
    encoded = json.dumps({"key": key, "weights": index}).encode()
    file.write(encoded)
    file.write(FOOTER.pack(MAGIC, offset, len(encoded), hashlib.sha256(encoded).digest()))
    file.flush()


def _one_ahead(weights: Iterable[tuple[str, Packed]]) -> Iterator[tuple[str, Packed]]:
    """The same weights, each repacked by another thread while the previous one is written."""
    source = iter(weights)
    with ThreadPoolExecutor(max_workers=1) as thread:
        upcoming = thread.submit(next, source, None)
        while (found := upcoming.result()) is not None:
            upcoming = thread.submit(next, source, None)
            yield found


def _checksum(data: memoryview) -> int:
    checksum = zlib.crc32(data[-SAMPLED_BYTES:])
    for start in range(0, len(data), SAMPLE_EVERY_BYTES):
        checksum = zlib.crc32(data[start : start + SAMPLED_BYTES], checksum)
    return checksum
