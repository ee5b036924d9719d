"""A local folder as the source of weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from starling.weights.digest import CHUNK_BYTES
from starling.weights.source import FileFaultError, Offer


@dataclass(frozen=True)
class LocalFolder:
    """Files that lie directly in `folder` (links are followed, so a snapshot of the hub's cache will do)."""

    folder: Path

    def offer(self, name: str) -> Offer:
        try:
            return Offer(size=(self.folder / name).stat().st_size)
        except OSError as error:
            raise FileFaultError(f"{name}: cannot be found in {self.folder} ({error.strerror})") from error

    def fetch(self, name: str, partial: Path, size: int, advance: Callable[[int], None]) -> None:
        try:
            with (self.folder / name).open("rb") as source, partial.open("ab") as target:
                source.seek(target.tell())
                while chunk := source.read(CHUNK_BYTES):
                    target.write(chunk)
                    advance(len(chunk))
        except OSError as error:
            raise FileFaultError(f"{name}: cannot be copied from {self.folder} ({error.strerror})") from error
        if partial.stat().st_size != size:
            raise FileFaultError(f"{name}: it changed while it was copied from {self.folder}; run the pull again")
