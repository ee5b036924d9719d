"""A source of files: the hub, a mirror that speaks like it, or a local folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from starling.errors import WeightsError
from starling.weights.lock import Lock


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


def open_source(where: str | None, lock: Lock, patience: Patience) -> Source:
    """`where`: URL of a mirror, path of a local folder, or None for the hub itself (or HF_ENDPOINT).

    Raises WeightsError when it is neither, or when HF_HUB_OFFLINE forbids the network.
    """
    if where is not None and not where.startswith(("http://", "https://")):
        from starling.weights.local_folder import LocalFolder

        return LocalFolder(Path(where))
    from starling.weights.hub import Hub  # imports huggingface_hub: 0.3 s that a start with weights need not spend

    return Hub(lock.repository, lock.revision, where, patience)
