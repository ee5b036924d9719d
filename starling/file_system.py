"""What file systems differ in: some know no locks, and some do not say how much they have free."""

import errno
import fcntl
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

# What flock answers on NFS whose server runs no lock daemon, on Lustre mounted without `flock`, and on such like.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def alone(path: Path, work: str) -> Iterator[None]:
    """Hold the lock file at `path`, which stays; the kernel drops the lock with the process, however that ends.

    `work` names what is done, for the log: it says when another process is waited for, and where there are no locks, so
    that nothing is held. Raises OSError where the file cannot be made.
    """
    with path.open("w") as file:
        try:
            _lock(file.fileno(), f"Another {work} is at work in {path.parent}; waiting for it")
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s knows no locks (%s): let no second %s run there", path.parent, error.strerror, work)
        yield


def _lock(file: int, meanwhile: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info(meanwhile)
        fcntl.flock(file, fcntl.LOCK_EX)


def free_disk_bytes(folder: Path) -> float:
    """What can still be written there; infinite where the file system does not say (its size is told as 0)."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else math.inf
