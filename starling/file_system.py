"""How file systems differ: some do not support locks, and some do not report their free space."""

import errno
import fcntl
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

# flock's errors on NFS whose server runs no lock daemon, on Lustre mounted without `flock`, and the like.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def exclusive_lock(path: Path, work: str) -> Iterator[None]:
    """Hold a lock on the file at `path`, which stays; the kernel releases it when the process ends, however it ends.

    `work` names the holder in the log, which reports waiting for another process, and a file system without locks,
    where nothing is held. Raises OSError if the file cannot be created.
    """
    with path.open("w") as file:
        try:
            _lock(file.fileno(), f"Another {work} is running in {path.parent}; waiting for it")
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s supports no locks (%s): do not run a second %s there", path.parent, error.strerror, work)
        yield


def _lock(file: int, waiting: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info(waiting)
        fcntl.flock(file, fcntl.LOCK_EX)


def free_disk_bytes(folder: Path) -> float:
    """Bytes that can still be written there; infinite if the file system does not say (it reports a size of 0)."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf
