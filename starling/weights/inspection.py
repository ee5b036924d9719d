"""Does a folder match the lock? Sizes first, then digests; every fault is reported."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from starling.weights import ledger
from starling.weights.digest import sha256_of
from starling.weights.ledger import Ledger
from starling.weights.lock import Lock, LockedFile
from starling.weights.progress import Progress

PARTIAL_FOLDER = ".partial"


def partial_path(folder: Path, lock: Lock, name: str) -> Path:
    """Where a file's bytes are collected until it is complete. Bytes of two revisions never mix."""
    return folder / PARTIAL_FOLDER / f"{name}.{lock.revision}"


class State(Enum):
    """What is known about one file."""

    VERIFIED = "verified"
    UNCHECKED = "not hashed yet"
    MISSING = "missing"
    WRONG_SIZE = "wrong size"
    WRONG_DIGEST = "wrong digest"
    UNREADABLE = "unreadable"
    EXTRA = "not in the lock"


@dataclass(frozen=True)
class FileReport:
    """One file's state; `detail` says what was found and what was expected."""

    name: str
    state: State
    detail: str = ""
    sha256: str | None = None
    first_use: bool = False  # nothing but this folder's own record vouches for the digest

    @property
    def is_fault(self) -> bool:
        return self.state not in {State.VERIFIED, State.UNCHECKED}

    def __str__(self) -> str:
        return f"{self.name}: {self.state.value}" + (f" ({self.detail})" if self.detail else "")


def inspect(folder: Path, lock: Lock) -> list[FileReport]:
    """Quick: sizes, and digests that the ledger remembers. Nothing is hashed."""
    known = Ledger.read(folder)
    return [_inspect_file(folder, lock, file, known) for file in lock.files] + _extra_files(folder, lock)


def verify(folder: Path, lock: Lock, *, afresh: bool = False, first_use: bool = True) -> list[FileReport]:
    """Hash what the ledger does not remember, or everything if `afresh`, and record what is right or wrong.

    A digest that neither the lock nor the ledger has is recorded, and expected from then on. Such a file stays
    UNCHECKED if `first_use` is False, or if another is wrong, since this may be another model's folder.
    """
    known = Ledger.read(folder)
    files = {file.name: file for file in lock.files}
    unknown = {name for name, file in files.items() if known.expected(lock, file) is None}
    due = {State.UNCHECKED, State.VERIFIED} if afresh else {State.UNCHECKED}
    reports = inspect(folder, lock)

    def hashed(names: Set[str]) -> list[FileReport]:
        return [
            _hash_file(folder, lock, files[report.name]) if report.name in names and report.state in due else report
            for report in reports
        ]

    reports = hashed(files.keys() - unknown)
    return hashed(unknown) if first_use and not faults(reports) else reports


def faults(reports: Sequence[FileReport]) -> list[str]:
    return [str(report) for report in reports if report.is_fault]


def _judge(lock: Lock, file: LockedFile, known: Ledger, sha256: str) -> FileReport:
    """Compare a digest with the one that the lock or the ledger expects."""
    expected = known.expected(lock, file)
    if expected is not None and sha256 != expected:
        source = "the lock says" if file.sha256 else "on first use it was"
        return FileReport(file.name, State.WRONG_DIGEST, f"sha256 is {sha256}, {source} {expected}", sha256)
    entry = known.files.get(file.name)
    if expected is None and entry is not None and entry.sha256 == sha256:
        return FileReport(file.name, State.WRONG_DIGEST, f"it was fetched for {entry.origin}", sha256)
    detail = "" if file.sha256 else "as on first use; the lock has no digest"
    return FileReport(file.name, State.VERIFIED, detail, sha256, first_use=file.sha256 is None)


def _inspect_file(folder: Path, lock: Lock, file: LockedFile, known: Ledger) -> FileReport:
    path = folder / file.name
    try:
        if not path.is_file():
            partial = partial_path(folder, lock, file.name)
            had = partial.stat().st_size if partial.is_file() else 0
            kept = f"{had} bytes of an interrupted pull are kept" if had else ""
            return FileReport(file.name, State.MISSING, kept)
        size = path.stat().st_size
        if file.size is not None and size != file.size:
            return FileReport(file.name, State.WRONG_SIZE, f"{size} bytes, the lock says {file.size}")
        sha256 = known.remembered(path)
    except OSError as error:  # in a folder that this user may not enter, for example
        return FileReport(file.name, State.UNREADABLE, error.strerror or str(error))
    if sha256 is None:
        return FileReport(file.name, State.UNCHECKED)
    return _judge(lock, file, known, sha256)


def _hash_file(folder: Path, lock: Lock, file: LockedFile) -> FileReport:
    path = folder / file.name
    try:
        before = path.stat()
        with Progress(f"Hashing {file.name}", before.st_size) as progress:
            sha256 = sha256_of(path, progress.advance)
    except OSError as error:
        return FileReport(file.name, State.UNREADABLE, error.strerror or str(error))
    known = Ledger.read(folder)
    report = _judge(lock, file, known, sha256)
    if report.is_fault:
        ledger.distrust(folder, file.name)
    else:
        ledger.record(folder, lock, file, sha256, before)
    return report


def _extra_files(folder: Path, lock: Lock) -> list[FileReport]:
    """Tensor files that the loader would read although the lock does not name them."""
    named = {file.name for file in lock.files}
    extra = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in named)
    return [FileReport(name, State.EXTRA, "it would be loaded; move it away") for name in extra]
