"""How much memory is free: what control groups leave counts, wherever this process stands among them."""

from pathlib import Path

import pytest

from starling.model.memory import _cgroup_free_bytes

GB = 10**9


def group(folder: Path, limit: str, used: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("0::/\n", 5 * GB),  # as in a container: the group is the root of what it sees
        ("0::/system.slice/starling.service\n", 2 * GB),
        ("0::/system.slice/another.service\n", 3 * GB),  # the one around it decides
        ("", 5 * GB),
    ],
)
def test_version_2(tmp_path: Path, lines: str, wanted: int) -> None:
    group(tmp_path, str(6 * GB), 1 * GB)
    group(tmp_path / "system.slice", str(4 * GB), 1 * GB)
    group(tmp_path / "system.slice" / "starling.service", str(2 * GB), 0)
    group(tmp_path / "system.slice" / "another.service", "max", 0)
    (tmp_path / "membership").write_text(lines)
    assert _cgroup_free_bytes(tmp_path, tmp_path / "membership") == wanted


def test_version_1(tmp_path: Path) -> None:
    group(tmp_path / "memory", str(2**63 - 4096), 9 * GB, version=1)
    group(tmp_path / "memory" / "box", str(8 * GB), 3 * GB, version=1)
    (tmp_path / "membership").write_text("5:cpu,cpuacct:/other\n4:memory:/box\n")
    assert _cgroup_free_bytes(tmp_path, tmp_path / "membership") == 5 * GB


def test_without_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert _cgroup_free_bytes(tmp_path, tmp_path / "none") == 2**63
