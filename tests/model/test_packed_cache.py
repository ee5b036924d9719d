"""Repacked weights in a file: the same model, whatever happened to the file."""

import errno
import logging
import mmap
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from starling.model import packed_cache
from starling.model.mistral import Mistral
from starling.model.ops import Packed
from starling.model.ops.cpu import CpuOps
from tests.model.sequences import Sequence, step
from tests.model.tiny import write_checkpoint

LAYOUT = "test-1"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown when the test fails
    torch.manual_seed(seed)
    write_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def some_weights() -> dict[str, Packed]:
    return {
        "large": {"weight": torch.randint(256, (3, 1 << 20), dtype=torch.uint8), "shape": torch.tensor([3, 1 << 20])},
        "odd": {"weight": torch.randn(7, 3), "scales": torch.randn(5).half()},
        "none": {"weight": torch.empty(0, 4)},
    }


class Repacking:
    """Yields weights and counts how often it was asked to."""

    def __init__(self, weights: dict[str, Packed]) -> None:
        self.weights = weights
        self.runs = 0

    def __call__(self) -> Iterator[tuple[str, Packed]]:
        self.runs += 1
        yield from self.weights.items()


def equal(found: dict[str, Packed], wanted: dict[str, Packed]) -> bool:
    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)

    return found.keys() == wanted.keys() and all(
        found[name].keys() == wanted[name].keys() and all(same(found[name][p], wanted[name][p]) for p in wanted[name])
        for name in wanted
    )


def cache_file(folder: Path) -> Path:
    (path,) = folder.glob("packed-*")
    return path


def logits(model: Mistral) -> torch.Tensor:
    tokens = torch.arange(40).tolist()
    return step(model, model.allocate_cache(3, 16), [(Sequence([2, 0, 1]), tokens)])[0]


def test_a_mapped_model_is_the_repacked_one(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    for precision in ("auto", "int16"):
        plain = logits(Mistral.load(checkpoint, CpuOps(2, precision), cache_folders=()))  # type: ignore[arg-type]
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                mapped = Mistral.load(checkpoint, CpuOps(2, precision))  # type: ignore[arg-type]
                assert torch.equal(logits(mapped), plain)
    assert caplog.text.count("Repacked the weights") == 2, "the two precisions differ in their output projection"
    assert len(list(checkpoint.glob("packed-*"))) == 2


def test_what_was_kept_comes_back(checkpoint: Path) -> None:
    weights = some_weights()
    repack = Repacking(weights)
    for _ in range(3):
        assert equal(packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint]), weights)
    assert repack.runs == 1


@pytest.mark.parametrize("change", ["config", "time", "values", "header", "layout"])
def test_another_checkpoint_or_layout_is_repacked(checkpoint: Path, change: str) -> None:
    repack = Repacking(some_weights())
    packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint])
    path = checkpoint / "model.safetensors"
    times = path.stat().st_mtime_ns
    if change == "config":
        config = checkpoint / "config.json"
        config.write_text(config.read_text().replace("300", "301"))
    elif change == "time":
        os.utime(path, ns=(times, times + 10**9))
    elif change == "header":
        content = bytearray(path.read_bytes())
        at = content.index(b"input_layernorm")
        content[at : at + 1] = b"j"
        path.write_bytes(content)
        os.utime(path, ns=(times, times))
    elif change == "values":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + random.randbytes(len(content) - len(content) // 2))
        os.utime(path, ns=(times, times))
    packed_cache.load_or_make(checkpoint, "test-2" if change == "layout" else LAYOUT, repack, [checkpoint])
    assert repack.runs == 2


def test_a_time_that_an_image_s_layer_cut_to_seconds_is_the_same(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    second = path.stat().st_mtime_ns // 10**9 * 10**9
    repack = Repacking(some_weights())
    for time in (second + 999_999_999, second):
        os.utime(path, ns=(time, time))
        packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint])
    assert repack.runs == 1


def test_a_checkpoint_that_is_mounted_elsewhere_is_the_same(checkpoint: Path) -> None:
    repack = Repacking(some_weights())
    packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint])
    elsewhere = checkpoint.rename(checkpoint.with_name("elsewhere"))
    packed_cache.load_or_make(elsewhere, LAYOUT, repack, [elsewhere])
    assert repack.runs == 1 and cache_file(elsewhere).name == f"packed-{LAYOUT}.bin"


def test_checkpoints_that_share_a_folder_have_a_file_each(checkpoint: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "another")
    for folder in (checkpoint, tmp_path / "another"):
        repack = Repacking(some_weights())
        for _ in range(2):
            packed_cache.load_or_make(folder, LAYOUT, repack, [tmp_path / "cache"])
        assert repack.runs == 1
    assert len(list((tmp_path / "cache").glob("packed-*.bin"))) == 2


def test_a_truncated_file_is_made_again(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = some_weights()
    repack = Repacking(weights)
    packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint])
    path = cache_file(checkpoint)
    content = path.read_bytes()
    dice = random.Random(len(content))
    lengths = [0, 1, packed_cache.FOOTER.size - 1, len(content) - 1, *(dice.randrange(len(content)) for _ in range(5))]
    for runs, length in enumerate(lengths, start=2):
        path.write_bytes(content[:length])
        assert equal(packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint]), weights)
        assert repack.runs == runs and path.read_bytes() == content
    assert caplog.text.count("cannot be used") == len(lengths)


def test_a_damaged_file_is_made_again(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One byte wrong anywhere in the index or the footer, or a lost disk block in a tensor."""
    weights = some_weights()
    repack = Repacking(weights)
    packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint])
    path = cache_file(checkpoint)
    content = path.read_bytes()
    _, index, _, _ = packed_cache.FOOTER.unpack(content[-packed_cache.FOOTER.size :])
    end = (3 << 20) - 4096  # the last block of the first tensor
    places = [0, 1 << 20, end, random.randrange(index, len(content)), len(content) - 1, len(content) - 41]
    for runs, place in enumerate(places, start=2):
        damaged = bytearray(content)
        if place < index:
            damaged[place : place + 4096] = bytes(4096)
        else:
            damaged[place] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        assert equal(packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint]), weights)
        assert repack.runs == runs, f"byte {place} of {len(content)}"
    assert caplog.text.count("cannot be used") == len(places)


def test_a_block_that_the_disk_cannot_read_is_reported(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unreadable(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError(errno.EFAULT, "Bad address")  # what Linux says before it would send SIGBUS

    weights = some_weights()
    repack = Repacking(weights)
    packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint])
    monkeypatch.setattr(mmap, "mmap", Unreadable)
    assert equal(packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint]), weights)
    assert repack.runs > 1 and "a block of it cannot be read" in caplog.text


def test_a_folder_that_cannot_be_written_is_skipped(checkpoint: Path, tmp_path: Path) -> None:
    blocked, other = tmp_path / "file", tmp_path / "other" / "folder"
    blocked.write_text("no folder")
    repack = Repacking(some_weights())
    for _ in range(2):
        packed_cache.load_or_make(checkpoint, LAYOUT, repack, [blocked / "below", other])
    assert repack.runs == 1 and cache_file(other).is_file()


def test_a_user_without_a_home_keeps_them_beside_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert packed_cache.default_folders(tmp_path) == (tmp_path,)


def test_with_nowhere_to_write_weights_stay_in_memory(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    weights = some_weights()
    found = packed_cache.load_or_make(checkpoint, LAYOUT, Repacking(weights), [tmp_path / "file" / "below"])
    assert equal(found, weights) and "every start repacks" in caplog.text


def test_a_kernel_that_cannot_read_ahead_still_maps(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Linux before 5.14."""
    monkeypatch.setattr(packed_cache, "MADV_POPULATE_READ", 9999)  # advice that no kernel knows
    repack = Repacking(some_weights())
    for _ in range(2):
        packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint])
    assert repack.runs == 1


def test_a_power_cut_leaves_a_whole_file_or_none(checkpoint: Path, disk_events: list[tuple[object, ...]]) -> None:
    packed_cache.load_or_make(checkpoint, LAYOUT, Repacking(some_weights()), [checkpoint])
    path = cache_file(checkpoint)
    inode = path.stat().st_ino
    assert disk_events == [("synced", inode), ("renamed", inode, path.name)]


def test_too_little_disk_space_is_noticed_before_writing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, free=10))
    packed_cache.load_or_make(checkpoint, LAYOUT, Repacking(some_weights()), [checkpoint])
    assert "every start repacks" in caplog.text
    assert not list(checkpoint.glob("packed-*"))


def test_an_error_while_repacking_leaves_nothing(checkpoint: Path) -> None:
    def broken() -> Iterator[tuple[str, Packed]]:
        yield "first", {"weight": torch.zeros(9)}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        packed_cache.load_or_make(checkpoint, LAYOUT, broken, [checkpoint])
    assert not list(checkpoint.glob("packed-*"))


def test_a_process_killed_half_way_is_replaced(checkpoint: Path) -> None:
    script = Path(__file__).parent / "die_while_repacking.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script, checkpoint], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half way\n"
        process.kill()
    assert cache_file(checkpoint).suffix == ".partial"
    cache_file(checkpoint).write_bytes(bytes(1000))  # of the file; it may not have got that far
    weights = some_weights()
    repack = Repacking(weights)
    for _ in range(2):
        assert equal(packed_cache.load_or_make(checkpoint, LAYOUT, repack, [checkpoint]), weights)
    assert repack.runs == 1
    assert cache_file(checkpoint).suffix == ".bin"


def _load(
    folder: Path, start: "multiprocessing.synchronize.Barrier", runs: "multiprocessing.queues.Queue[int]"
) -> None:
    torch.manual_seed(0)
    weights = some_weights()
    repack = Repacking(weights)
    start.wait()
    assert equal(packed_cache.load_or_make(folder, LAYOUT, repack, [folder]), weights)
    runs.put(repack.runs)


def test_processes_that_start_together_repack_once(checkpoint: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, runs = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_load, args=(checkpoint, start, runs)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(runs.get(timeout=10) for _ in processes) == [0, 0, 1]
    assert cache_file(checkpoint).suffix == ".bin"
