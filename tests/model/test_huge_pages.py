"""Huge pages: bytes keep address and value while the pages beneath them are replaced; tensors are allocated in them."""

import ctypes
import mmap
import random
import re
import threading
from pathlib import Path

import pytest
import torch

from starling.model import huge_pages, packed_cache
from starling.model.huge_pages import HUGE_BYTES, empty, move_to_huge_pages
from tests.model.tiny import write_checkpoint

SIZE = 5 * HUGE_BYTES + 4321  # whole huge pages, and remainders before and after them
CPU = torch.device("cpu")
UNAVAILABLE = [("enabled", "always madvise [never]\n"), ("hpage_pmd_size", f"{512 << 20}\n"), ("enabled", None)]


@pytest.fixture(autouse=True)
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the system reports of its huge pages: here they are available, whatever this machine has."""
    folder = tmp_path / "transparent_hugepage"
    folder.mkdir()
    (folder / "enabled").write_text("always [madvise] never\n")
    (folder / "hpage_pmd_size").write_text(f"{HUGE_BYTES}\n")
    monkeypatch.setattr(huge_pages, "SYSTEM", folder)
    return folder


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


def asks_for_huge_pages(address: int) -> bool:
    """Whether the memory at `address` was marked for them (hg, see man 5 proc_pid_smaps)."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(span[1], 16) <= address < int(span[2], 16)
        elif here and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return True  # this system does not report it


@pytest.mark.parametrize("piece_bytes", [HUGE_BYTES, 2 * HUGE_BYTES, 64 * HUGE_BYTES])
def test_readers_see_the_same_bytes_throughout(file: Path, piece_bytes: int) -> None:
    wanted, open_before = file.read_bytes(), sorted(Path("/proc/self/fd").iterdir())
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
    assert asks_for_huge_pages(ctypes.addressof(ctypes.c_char.from_buffer(mapped)) + 2 * HUGE_BYTES)
    mapped.close()
    assert mapped_from(file) == 0
    assert sorted(Path("/proc/self/fd").iterdir()) == open_before


def test_repacked_weights_move(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    weights = {"large": {"weight": torch.randint(256, (SIZE,), dtype=torch.uint8)}}
    found = packed_cache.load_or_make(tmp_path, "test-1", lambda: iter(weights.items()), [tmp_path])
    huge_pages.wait_for_moves()
    assert torch.equal(found["large"]["weight"], weights["large"]["weight"])
    assert mapped_from(tmp_path / "packed-test-1.bin") < 2 * HUGE_BYTES


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


def test_when_memory_is_short_nothing_moves(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "free_bytes", lambda device: SIZE - 1)
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        assert move_to_huge_pages(mapped, opened.fileno()) is None
    assert mapped_from(file) >= SIZE


def test_a_file_smaller_than_a_huge_page_stays(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(HUGE_BYTES - 1))
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        assert move_to_huge_pages(mapped, opened.fileno()) is None


@pytest.fixture(params=UNAVAILABLE, ids=["off", "larger", "unknown"])
def unavailable(request: pytest.FixtureRequest, system: Path) -> None:
    name, text = request.param
    (system / name).unlink()
    if text:
        (system / name).write_text(text)


@pytest.mark.usefixtures("unavailable")
def test_without_huge_pages_nothing_moves(file: Path) -> None:
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        assert move_to_huge_pages(mapped, opened.fileno()) is None


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_tensor_begins_with_a_huge_page_and_takes_memory_as_it_is_written() -> None:
    before = resident_bytes()
    tensor = empty((2, 64, 1 << 20), torch.float16, CPU)
    assert tensor.shape == (2, 64, 1 << 20) and tensor.dtype == torch.float16 and tensor.is_contiguous()
    assert tensor.data_ptr() % HUGE_BYTES == 0 and asks_for_huge_pages(tensor.data_ptr())
    assert resident_bytes() - before < tensor.nbytes // 4
    tensor.fill_(1)
    assert resident_bytes() - before > tensor.nbytes // 2
    view = tensor[1, 63]
    del tensor
    assert (view == 1).all()
    del view
    assert resident_bytes() - before < 64 << 20


@pytest.mark.usefixtures("unavailable")
def test_without_huge_pages_torch_allocates_a_tensor() -> None:
    tensor = empty((3, 5), torch.float32, CPU)
    assert tensor.shape == (3, 5) and tensor.dtype == torch.float32
