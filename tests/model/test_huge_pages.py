"""Bytes stay where and what they are while the pages below them are replaced."""

import mmap
import random
import re
import threading
from pathlib import Path

import pytest

from starling.model import huge_pages
from starling.model.huge_pages import HUGE_BYTES, move_to_huge_pages

SIZE = 5 * HUGE_BYTES + 4321  # whole huge pages, and what is left before and behind them


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(random.randbytes(SIZE))
    return path


def mapped_from(path: Path) -> int:
    """Bytes of this process's memory that lie in `path`."""
    sizes = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f" {path}"):
            begin, end = (int(address, 16) for address in re.split("[- ]", line)[:2])
            sizes += end - begin
    return sizes


@pytest.mark.parametrize("piece_bytes", [HUGE_BYTES, 2 * HUGE_BYTES, 64 * HUGE_BYTES])
def test_readers_see_the_same_bytes_throughout(file: Path, piece_bytes: int) -> None:
    wanted = file.read_bytes()
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        assert mapped_from(file) >= SIZE
        ended, wrong = threading.Event(), []

        def read() -> None:
            while not ended.is_set():
                at = random.randrange(SIZE - 1000)
                if mapped[at : at + 1000] != wanted[at : at + 1000]:
                    wrong.append(at)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        moving = move_to_huge_pages(mapped, opened.fileno(), piece_bytes)
    assert moving is not None
    huge_pages.wait_for_moves()
    assert not moving.is_alive()
    ended.set()
    for reader in readers:
        reader.join()
    assert not wrong and mapped[:] == wanted
    assert mapped_from(file) < 2 * HUGE_BYTES
    mapped.close()
    assert mapped_from(file) == 0


def test_a_file_that_has_become_shorter_stays_mapped(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    file.write_bytes(b"")
    with file.open("rb") as opened, caplog.at_level("INFO"):
        moving = move_to_huge_pages(mapped, opened.fileno())
        assert moving is not None
        moving.join()
    assert "become shorter" in caplog.text
    assert mapped_from(file) >= SIZE


def test_where_memory_is_short_nothing_moves(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "free_bytes", lambda device: SIZE - 1)
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        assert move_to_huge_pages(mapped, opened.fileno()) is None
    assert mapped_from(file) >= SIZE


def test_what_fills_no_huge_page_stays(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(HUGE_BYTES - 1))
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        assert move_to_huge_pages(mapped, opened.fileno()) is None
