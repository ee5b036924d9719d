"""Where compiled kernels are kept: a folder of this user's, and a lock so that processes compile one after another."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starling.errors import DeviceError


def user_cache() -> Path:
    """A folder of this user's that can be written to. Raises DeviceError where there is none."""
    for base in (Path.home() / ".cache", Path(tempfile.gettempdir()) / f"starling-{_user()}"):
        folder = base / "starling"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    homes = f"{Path.home() / '.cache'} nor {tempfile.gettempdir()}"
    raise DeviceError(f"Compiled kernels cannot be kept: neither {homes} can be written to.")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; it goes with the process, however that ends."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"
