"""The control groups that limit this process: its own and those above it, in version 2 and version 1."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def limiting_groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of each group that may limit what `controller` controls ("cpu", "memory").

    A folder may be missing: a container sees its own group as the root, while the path that it reads may be its
    host's.
    """
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        lines = []
    for line in ["0::/", f"0:{controller}:/", *lines]:
        _, controllers, path = line.split(":", 2)
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):
            if controllers == "":
                yield 2, ROOT / group
            elif controller in controllers.split(","):
                yield 1, ROOT / controller / group
