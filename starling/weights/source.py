"""What a source of files offers, and how it fails. hub.py and local_folder.py are sources."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from starling.errors import WeightsError


class FileFaultError(WeightsError):
    """One file cannot be had from this source; others may."""


class SourceLostError(WeightsError):
    """The source does not answer; asking it for other files is no use."""


@dataclass(frozen=True)
class Patience:
    """How long a source is waited for."""

    stall_s: float = 30.0  # a connection that brings next to nothing for so long is given up
    attempts: int = 5  # failures in a row, without progress between them
    first_wait_s: float = 1.0  # doubled after every failure


@dataclass(frozen=True)
class Offer:
    """What a source says of a file before it sends any of it."""

    size: int  # bytes
    sha256: str | None = None
    git_blob_sha1: str | None = None


class Source(Protocol):
    """Both calls raise FileFaultError or SourceLostError."""

    def offer(self, name: str) -> Offer: ...

    def fetch(self, name: str, partial: Path, size: int, advance: Callable[[int], None]) -> None:
        """Bring `partial` to `size` bytes, going on from what it holds. What arrived before an error stays in it."""
