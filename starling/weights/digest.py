"""Digests of files on disk."""

import hashlib
from collections.abc import Callable
from pathlib import Path

CHUNK_BYTES = 4 << 20


def sha256_of(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file; `advance` is called with the number of bytes of each read."""
    return _digest(path, hashlib.sha256(), advance)


def git_blob_sha1_of(path: Path) -> str:
    """Hex id that git gives the file's content (a blob id). The hub sends it for files outside LFS."""
    header = f"blob {path.stat().st_size}\0".encode()
    return _digest(path, hashlib.sha1(header, usedforsecurity=False), None)


def _digest(path: Path, digest: "hashlib._Hash", advance: Callable[[int], None] | None) -> str:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if advance:
                advance(len(chunk))
    return digest.hexdigest()
