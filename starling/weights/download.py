"""Make a folder match the lock, from the hub, a mirror or a local folder.

A file is fetched under another name, flushed to disk, checked, and only then renamed into place, so whatever has its
final name is complete. A pull can be stopped at any point and leaves nothing to clean up; the next one resumes there.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from starling.errors import WeightsError
from starling.file_system import exclusive_lock, free_disk_bytes
from starling.weights import ledger
from starling.weights.digest import git_blob_sha1_of, sha256_of
from starling.weights.inspection import PARTIAL_FOLDER, FileReport, State, faults, partial_path, verify
from starling.weights.ledger import Ledger
from starling.weights.local_folder import LocalFolder
from starling.weights.lock import Lock, LockedFile
from starling.weights.progress import Progress
from starling.weights.source import FileFaultError, Offer, RetryPolicy, Source, SourceUnavailableError

logger = logging.getLogger(__name__)

PULL_LOCK_NAME = ".pull.lock"


@dataclass(frozen=True)
class _Wanted:
    """A file to fetch, what the source says about it, and where its bytes are collected."""

    file: LockedFile
    offer: Offer
    partial: Path

    @property
    def had_bytes(self) -> int:
        return self.partial.stat().st_size if self.partial.exists() else 0


def pull(lock: Lock, folder: Path, where: str | None = None, retry: RetryPolicy | None = None) -> list[FileReport]:
    """Make `folder` match `lock`; every report returned is VERIFIED. `where`: see `open_source`.

    Two pulls of one folder take turns, and the second finds the work done.
    Raises a WeightsError that lists every fault; files that were right before stay as they are.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / PULL_LOCK_NAME, "pull"):
            reports = verify(folder, lock, first_use=False)
            extra = [str(report) for report in reports if report.state is State.EXTRA]
            names = {report.name for report in reports if report.state is not State.VERIFIED}
            files = [file for file in lock.files if file.name in names]
            if files:
                source = open_source(where, lock, retry or RetryPolicy())
                _raise_if(extra + _fetch(lock, folder, files, source), folder)
            _clear(folder)
            reports = verify(folder, lock)
    except OSError as error:
        raise WeightsError(f"The weights cannot be written to {folder}: {error}.") from error
    _raise_if(faults(reports), folder)
    return reports


def open_source(where: str | None, lock: Lock, retry: RetryPolicy) -> Source:
    """`where`: URL of a mirror, path of a local folder, or None for the hub itself (or HF_ENDPOINT).

    Raises WeightsError when it is neither, when HF_ENDPOINT is not a URL, or when HF_HUB_OFFLINE forbids the network.
    """
    if where is not None and "://" not in where:
        if not Path(where).is_dir():
            shown = where.rpartition("@")[2]  # a password may precede it if the scheme was left out
            raise WeightsError(f"{shown!r} is not a source of weights: it is neither a folder nor an http(s) URL.")
        return LocalFolder(Path(where))
    # Imported here: these and huggingface_hub take 0.3 s, which a start that has its weights need not spend.
    from starling.weights.address import checked

    if endpoint := os.environ.get("HF_ENDPOINT"):
        try:
            checked(endpoint)  # importing huggingface_hub fails on an invalid one, even if a mirror is named
        except WeightsError as error:
            raise WeightsError(f"HF_ENDPOINT cannot be used. {error}") from None
    from starling.weights.hub import Hub

    return Hub(lock.repository, lock.revision, where, retry)


def _fetch(lock: Lock, folder: Path, files: Sequence[LockedFile], source: Source) -> list[str]:
    """Fetch `files` into `folder`, and return what went wrong."""
    wanted, found = _ask(lock, folder, files, source)
    if found:
        return found
    wanted = [one for one in wanted if not _adopt(lock, folder, one)]
    need_bytes = sum(one.offer.size - one.had_bytes for one in wanted)
    free_bytes = free_disk_bytes(folder)
    if need_bytes > free_bytes:
        return [f"the disk has {free_bytes} bytes free but {need_bytes} are needed; make room or name another folder"]
    (folder / PARTIAL_FOLDER).mkdir(exist_ok=True)
    for one in sorted(wanted, key=lambda one: one.offer.size):
        try:
            _fetch_file(lock, folder, one, source)
        except FileFaultError as error:
            found.append(str(error))
        except SourceUnavailableError as error:
            found.append(f"{error}. What has arrived is kept; the next pull resumes from there")
            break
    return found


def _ask(lock: Lock, folder: Path, files: Sequence[LockedFile], source: Source) -> tuple[list[_Wanted], list[str]]:
    """What the source says about `files`, and what is wrong with that, before any of them is fetched."""
    wanted, found = [], []
    for file in files:
        try:
            offer = source.offer(file.name)
        except FileFaultError as error:
            found.append(str(error))
            continue
        except SourceUnavailableError as error:
            found.append(str(error))
            break
        if file.size is not None and offer.size != file.size:
            found.append(f"{file.name}: the source has {offer.size} bytes, the lock says {file.size}")
        elif offer.sha256 and file.sha256 and offer.sha256 != file.sha256:
            found.append(f"{file.name}: the source has sha256 {offer.sha256}, the lock says {file.sha256}")
        partial = partial_path(folder, lock, file.name)
        if partial.exists() and partial.stat().st_size > offer.size:
            partial.unlink()
        wanted.append(_Wanted(file, offer, partial))
    return wanted, found


def _adopt(lock: Lock, folder: Path, wanted: _Wanted) -> bool:
    """Whether the file is there already and the source's checksum shows that it is right; if so, record it."""
    path = folder / wanted.file.name
    if not path.is_file() or not (wanted.offer.sha256 or wanted.offer.git_blob_sha1):
        return False
    stat = path.stat()
    if stat.st_size != wanted.offer.size or _mismatch(lock, folder, wanted, path, sha256 := sha256_of(path)):
        return False
    ledger.record(folder, lock, wanted.file, sha256, stat)
    return True


def _fetch_file(lock: Lock, folder: Path, wanted: _Wanted, source: Source) -> None:
    """Raises FileFaultError or SourceUnavailableError."""
    name, size, partial = wanted.file.name, wanted.offer.size, wanted.partial
    resumed = wanted.had_bytes > 0
    kept = f", of which {wanted.had_bytes} are here already" if resumed else ""
    logger.info("Fetching %s: %d bytes%s", name, size, kept)
    if wanted.had_bytes < size:
        with Progress(name, size, wanted.had_bytes) as progress:
            source.fetch(name, partial, size, progress.advance)
    with Progress(f"Hashing {name}", size) as progress:
        sha256 = sha256_of(partial, progress.advance)
    fault = _mismatch(lock, folder, wanted, partial, sha256)
    if fault:
        partial.unlink()
        if resumed:
            logger.warning("%s: %s; part of it was from an earlier pull, so it is fetched again", name, fault)
            return _fetch_file(lock, folder, wanted, source)
        raise FileFaultError(f"{name}: {fault}; what arrived was discarded")
    _promote(partial, folder / name)
    ledger.record(folder, lock, wanted.file, sha256, (folder / name).stat())
    return None


def _mismatch(lock: Lock, folder: Path, wanted: _Wanted, path: Path, sha256: str) -> str | None:
    """Why `path`, whose digest is `sha256`, is not the wanted file; None when it is."""
    expected = Ledger.read(folder).expected(lock, wanted.file) or wanted.offer.sha256
    if expected is not None:
        return None if sha256 == expected else f"sha256 is {sha256}, expected {expected}"
    if wanted.offer.git_blob_sha1 is not None:
        found = git_blob_sha1_of(path)
        if found != wanted.offer.git_blob_sha1:
            return f"its git blob id is {found}, the source says {wanted.offer.git_blob_sha1}"
    return None


def _promote(partial: Path, path: Path) -> None:
    """Give a complete, checked file its name, so that a power cut leaves the old state or the new one."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    # Whole seconds survive archives and image layers, so the ledger's record of this file stays valid there.
    whole_s = int(partial.stat().st_mtime)
    with suppress(PermissionError):  # on a network share, the writer may not own the file
        os.utime(partial, (whole_s, whole_s))
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # shares cannot flush folders (EINVAL); a file whose name is lost is fetched again
            os.fsync(folder)
    finally:
        os.close(folder)


def _clear(folder: Path) -> None:
    """Remove what interrupted pulls left behind."""
    shutil.rmtree(folder / PARTIAL_FOLDER, ignore_errors=True)
    for left in folder.glob(f"{ledger.LEDGER_NAME}.*"):
        left.unlink(missing_ok=True)


def _raise_if(found: Sequence[str], folder: Path) -> None:
    if found:
        lines = "".join(f"\n  - {fault}" for fault in found)
        raise WeightsError(f"The weights in {folder} could not be made to match the lock:{lines}")
