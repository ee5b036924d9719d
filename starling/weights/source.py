"""What a source of files offers, and how it fails. hub.py and local_folder.py are sources."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from starling.errors import WeightsError


class FileFaultError(WeightsError):
    """This source cannot provide one file, but may provide others."""


class SourceUnavailableError(WeightsError):
    """The source does not answer; asking it for other files is pointless."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait for a source."""

    stall_s: float = 30.0  # a connection that delivers next to nothing for this long is dropped
    attempts: int = 5  # failures in a row, without progress between them
    first_wait_s: float = 1.0  # doubled after every failure


@dataclass(frozen=True)
class Offer:
    """What a source says about a file before sending any of it."""

    size: int  # bytes
    sha256: str | None = None
    git_blob_sha1: str | None = None


class Source(Protocol):
    """Both calls raise FileFaultError or SourceUnavailableError."""

    def offer(self, name: str) -> Offer: ...

    def fetch(self, name: str, partial: Path, size: int, advance: Callable[[int], None]) -> None:
        """Extend `partial` to `size` bytes, resuming from what it holds. What arrived before an error stays in it."""
