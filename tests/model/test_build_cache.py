"""Compiled kernels are found wherever this user may have them, and never where another user could have put them."""

import shutil
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from starling.errors import DeviceError
from starling.model.ops import build_cache
from starling.model.ops.build_cache import cached_build
from starling.model.ops.cpu import TorchCpuOps, cpu_ops, library


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folders searched for this user: one in the home, one among temporary files."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr("os.getuid", lambda: 1234)
    (tmp_path / "tmp").mkdir()
    return tmp_path / "home" / ".cache" / "starling", tmp_path / "tmp" / "starling-1234"


def build(path: Path) -> None:
    path.write_text("built")


def never(path: Path) -> None:
    raise AssertionError(f"{path} is there already")


def test_it_is_built_once_in_the_home(folders: tuple[Path, Path]) -> None:
    home, other = folders
    assert cached_build("a", build) == cached_build("a", never) == home / "a"
    assert (home / "a").read_text() == "built"
    assert sorted(path.name for path in home.iterdir()) == ["a", "a.lock"] and not other.exists()


def test_it_is_found_where_nothing_can_be_written(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cached_build("a", build)

    def fail(path: Path, build: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(build_cache, "_make", fail)
    assert cached_build("a", never) == folders[0] / "a"
    with pytest.raises(DeviceError, match=r"cannot be cached .*Read-only.*Read-only.*Give this user"):
        cached_build("b", never)


def test_a_folder_that_cannot_take_it_leaves_it_to_the_next(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, other = folders
    home.parent.parent.mkdir()
    home.parent.write_text("in the way")
    assert cached_build("a", build) == other / "a"
    home.parent.unlink()
    free = {home: 1 << 20, other: 1 << 30}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=1 << 30, free=free[folder]))
    assert cached_build("b", build) == other / "b"


@pytest.mark.parametrize(
    ("mode", "owner", "ours"),
    [
        (stat.S_IFDIR | 0o700, 1234, True),
        (stat.S_IFDIR | 0o775, 1234, True),
        (stat.S_IFDIR | 0o755, 0, True),
        (stat.S_IFDIR | 0o700, 4321, False),
        (stat.S_IFDIR | 0o777, 1234, False),
        (stat.S_IFLNK | 0o777, 1234, False),
        (stat.S_IFREG | 0o700, 1234, False),
    ],
)
def test_nothing_is_taken_from_a_folder_that_another_user_may_have_filled(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, mode: int, owner: int, ours: bool
) -> None:
    home, other = folders
    other.mkdir()
    (other / "a").write_text("planted")
    lstat = Path.lstat

    def changed(path: Path) -> object:
        return SimpleNamespace(st_mode=mode, st_uid=owner) if path == other else lstat(path)

    monkeypatch.setattr(Path, "lstat", changed)
    assert cached_build("a", build) == (other / "a" if ours else home / "a")


def test_a_user_without_a_home_and_a_system_without_a_temporary_folder(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert cached_build("a", build) == folders[1] / "a"

    def nothing() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nothing)
    with pytest.raises(DeviceError, match="cannot be cached"):
        cached_build("a", build)


def test_kernels_that_cannot_be_loaded_leave_plain_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As from a folder that is mounted noexec."""
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr(library, "library_paths", lambda *parts: [tmp_path / "broken.so"] * len(parts))
    library.usable_instruction_sets.cache_clear()
    try:
        assert isinstance(cpu_ops(1), TorchCpuOps)
    finally:
        library.usable_instruction_sets.cache_clear()
    assert "cannot be loaded" in caplog.text
