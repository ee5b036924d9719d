"""Where compiled kernels are kept: found in one of this user's folders, or made in the first that can take them."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from starling.errors import DeviceError
from starling.file_system import alone, free_disk_bytes

LEAST_BYTES = 32 << 20  # that a folder must have free: a compiler that runs out does not say so


def kept(name: str, build: Callable[[Path], None], folder: Path | None = None) -> Path:
    """The file `name`: from `folder`, or from the first of this user's that holds it, even if none can be written to.

    Else `build` makes it at the path that it is given, and it is kept in the first that takes it. Processes that start
    together build once; the file appears by renaming, whole. Raises DeviceError where it cannot be kept.
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
        f"Compiled kernels cannot be kept ({'; '.join(faults) or 'no folder is safe'}). "
        "Give this user a home or a temporary folder that can be written to."
    )


def _folders() -> Iterator[Path]:
    with suppress(RuntimeError):  # no HOME, and a user that the system does not know
        yield from filter(_is_ours, [Path.home() / ".cache" / "starling"])
    with suppress(FileNotFoundError):  # nothing can be written to
        yield from filter(_is_ours, [Path(tempfile.gettempdir()) / f"starling-{os.getuid()}"])


def _is_ours(folder: Path) -> bool:
    """Nobody else, who could guess its name in a folder for all, made it or may write to it: what it holds is run."""
    try:
        found = folder.lstat()
    except OSError:
        return True  # it is to be made
    return stat.S_ISDIR(found.st_mode) and found.st_uid in (0, os.getuid()) and not found.st_mode & stat.S_IWOTH


def _make(path: Path, build: Callable[[Path], None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with alone(path.with_name(f"{path.name}.lock"), "compiler"):
        if not path.exists():
            if free_disk_bytes(path.parent) < LEAST_BYTES:
                raise OSError(f"{path.parent} has less than {LEAST_BYTES >> 20} MiB free")
            with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
                build(Path(scratch) / path.name)
                (Path(scratch) / path.name).replace(path)
    return path
