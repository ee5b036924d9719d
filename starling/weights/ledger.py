"""The ledger: the digests that were computed for a folder's files, kept beside them.

It saves hashing 4 GB at every start: an entry is valid while the file keeps its size and modification time, and no
other digest has been found. It also holds the digests that the lock does not have yet, as found on first use.
"""

import logging
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from starling.weights.lock import Lock, LockedFile

logger = logging.getLogger(__name__)

LEDGER_NAME = ".verified.json"
SECOND_NS = 10**9
NEVER_NS = -1  # instead of the time of a file that must be hashed again


class Entry(BaseModel):
    """One file as it was when it was hashed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    origin: str  # repository@revision that the file was checked for
    size: int  # bytes
    mtime_ns: int
    sha256: str


class Ledger(BaseModel):
    """name → Entry. Read with `read`, changed with `record` and `distrust`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    files: dict[str, Entry] = {}

    @classmethod
    def read(cls, folder: Path) -> "Ledger":
        """The folder's ledger; an empty one when there is none, or when it cannot be read (which is logged)."""
        try:
            return cls.model_validate_json((folder / LEDGER_NAME).read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError) as error:
            logger.warning("%s is unreadable and is treated as empty: %s", folder / LEDGER_NAME, type(error).__name__)
            return cls()

    def remembered(self, path: Path) -> str | None:
        """The sha256 of `path` if it was hashed before and has not changed since.

        Image layers keep a file's time in whole seconds (containerd's archive/tar.go), so a time truncated to them
        counts as the same: otherwise every start of a pulled image would hash again.
        """
        entry = self.files.get(path.name)
        if entry is None:
            return None
        stat = path.stat()
        same_times = (entry.mtime_ns, entry.mtime_ns - entry.mtime_ns % SECOND_NS)
        return entry.sha256 if stat.st_size == entry.size and stat.st_mtime_ns in same_times else None

    def expected(self, lock: Lock, file: LockedFile) -> str | None:
        """The sha256 that `file` must have: the lock's, or the one found on first use; None before that."""
        entry = self.files.get(file.name)
        if file.sha256 is None and entry is not None and entry.origin == origin_of(lock):
            return entry.sha256
        return file.sha256


def origin_of(lock: Lock) -> str:
    return f"{lock.repository}@{lock.revision}"


def record(folder: Path, lock: Lock, file: LockedFile, sha256: str, stat: os.stat_result) -> None:
    """Record that `file` had this digest in `folder` when its stat was `stat`, taken before it was hashed.

    The log reports the first use of a digest that the lock does not have, and a folder that cannot be written.
    """
    known = Ledger.read(folder)
    if known.expected(lock, file) is None:
        logger.warning("%s: the lock has no digest; sha256 %s is trusted on first use", file.name, sha256)
    entry = Entry(origin=origin_of(lock), size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=sha256)
    _write(folder, {**known.files, file.name: entry})


def distrust(folder: Path, name: str) -> None:
    """No longer treat `name` as right, though its size and time still match (as after a disk fault)."""
    files = Ledger.read(folder).files
    if name in files:
        _write(folder, {**files, name: files[name].model_copy(update={"mtime_ns": NEVER_NS})})


def _write(folder: Path, files: dict[str, Entry]) -> None:
    temporary = folder / f"{LEDGER_NAME}.{os.getpid()}"
    try:
        temporary.write_text(Ledger(files=files).model_dump_json(indent=2), encoding="utf-8")
        temporary.replace(folder / LEDGER_NAME)
    except OSError as error:
        logger.info("%s cannot store its digests (%s): they will be computed again at the next start", folder, error)
