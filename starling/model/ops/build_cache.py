"""The cache of compiled kernels: found in one of this user's folders, or built in the first that accepts them."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from starling.errors import DeviceError
from starling.file_system import exclusive_lock, free_disk_bytes

MIN_FREE_BYTES = 32 << 20  # needed in a folder before building there: a compiler that fills the disk does not say so


def cached_build(name: str, build: Callable[[Path], None], folder: Path | None = None) -> Path:
    """The path of file `name`: in the first of this user's folders that has it, even read-only.

    `folder` takes the place of those folders. If none has it, `build` writes it to the path it is given, and the first
    folder that accepts it keeps it. Processes that start together build it once; it is renamed into place, so it always
    appears whole. Raises DeviceError if no folder can keep it.
    """
    folders = [folder] if folder else list(_folders())
    for each in folders:
        with suppress(OSError):
            if (each / name).exists():
                return each / name
    faults = []
    for each in folders:
        try:
            return _make(each / name, build)
        except OSError as error:
            faults.append(str(error))
    raise DeviceError(
        f"Compiled kernels cannot be cached ({'; '.join(faults) or 'no folder is safe'}). "
        "Give this user a writable home or temporary folder."
    )


def _folders() -> Iterator[Path]:
    with suppress(RuntimeError):  # no HOME, and the system does not know this user
        yield from filter(_is_trusted, [Path.home() / ".cache" / "starling"])
    with suppress(FileNotFoundError):  # no writable temporary folder
        yield from filter(_is_trusted, [Path(tempfile.gettempdir()) / f"starling-{os.getuid()}"])


def _is_trusted(folder: Path) -> bool:
    """Whether only we or root can have made or filled `folder`, whose name is easy to guess: we run what it holds."""
    try:
        found = folder.lstat()
    except OSError:
        return True  # not there yet: we will make it
    return stat.S_ISDIR(found.st_mode) and found.st_uid in (0, os.getuid()) and not found.st_mode & stat.S_IWOTH


def _make(path: Path, build: Callable[[Path], None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with exclusive_lock(path.with_name(f"{path.name}.lock"), "compiler"):
        if not path.exists():
            if free_disk_bytes(path.parent) < MIN_FREE_BYTES:
                raise OSError(f"{path.parent} has less than {MIN_FREE_BYTES >> 20} MiB free")
            with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
                build(Path(scratch) / path.name)
                (Path(scratch) / path.name).replace(path)
    return path
