"""How much memory steps take, and how much control groups leave free, wherever this process is in them."""

import json
import mmap
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from starling.model import control_groups, memory
from starling.model.checkpoint import DTYPES, expected_tensors
from starling.model.config import ModelConfig
from starling.model.kv_cache import KVCache
from starling.model.memory import (
    GPU_RESERVE_BYTES,
    activation_bytes,
    finish_loading,
    free_bytes,
    kv_cache_budget,
    kv_cache_room,
)
from starling.model.mistral import Mistral
from starling.model.ops.cuda import CudaOps
from tests.model.sequences import Sequence, step
from tests.model.tiny import CONFIG, write_checkpoint

GB = 10**9
CPU = torch.device("cpu")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of control groups, on a machine that has a terabyte free."""
    monkeypatch.setattr(control_groups, "ROOT", tmp_path)
    monkeypatch.setattr(control_groups, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000 * GB))
    monkeypatch.setattr(memory, "_mapped_bytes", lambda: 0)
    return tmp_path


def group(folder: Path, limit: str, used: int, version: int = 2, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    total = "" if version == 2 else "total_"
    stat = {"file": cached, f"{total}active_file": cached // 4, f"{total}inactive_file": cached - cached // 4}
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))


@pytest.mark.parametrize(
    ("lines", "free", "room"),
    [
        ("0::/\n", 5 * GB, 6 * GB),  # as in a container, which sees its own group as the root
        ("0::/system.slice/starling.service\n", 2 * GB, 2 * GB),
        ("0::/system.slice/another.service\n", 3 * GB, 4 * GB),  # the one above it decides
        ("0::/system.slice/another:one.service\n", 3 * GB, 4 * GB),
        ("", 5 * GB, 6 * GB),
    ],
)
def test_version_2(groups: Path, lines: str, free: int, room: int) -> None:
    group(groups, str(6 * GB), 1 * GB)
    group(groups / "system.slice", str(4 * GB), 1 * GB)
    group(groups / "system.slice" / "starling.service", str(2 * GB), 0)
    group(groups / "system.slice" / "another.service", "max", 0)
    (groups / "membership").write_text(lines)
    assert (free_bytes(CPU), kv_cache_room(CPU, 0)) == (free, room)
    assert kv_cache_budget(CPU, 0) == free // 2, "other processes on this machine need some too"


def test_a_block_takes_the_bytes_that_it_is_counted_for() -> None:
    config, dtype = ModelConfig.from_dict(CONFIG), torch.bfloat16
    cache = KVCache.allocate(config, 5, 16, dtype, CPU)
    assert cache.keys.nbytes + cache.values.nbytes == 5 * KVCache.bytes_per_block(config, 16, dtype)


def test_version_1(groups: Path) -> None:
    group(groups / "memory", str(2**63 - 4096), 9 * GB, version=1)
    group(groups / "memory" / "box", str(8 * GB), 3 * GB, version=1)
    (groups / "membership").write_text("5:cpu,cpuacct:/other\n4:memory:/box\n")
    assert (free_bytes(CPU), kv_cache_room(CPU, 0)) == (5 * GB, 8 * GB)


@pytest.mark.parametrize("version", [1, 2])
def test_cached_files_count_as_free_except_for_mapped_ones(
    groups: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    folder = groups / "memory" if version == 1 else groups
    group(folder, str(8 * GB), 7 * GB, version, cached=6 * GB)
    assert free_bytes(CPU) == 7 * GB
    monkeypatch.setattr(memory, "_mapped_bytes", lambda: 4 * GB)
    assert free_bytes(CPU) == 3 * GB
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * GB))
    assert free_bytes(CPU) == 0


@pytest.mark.parametrize("stat", [None, "cache 5\n"])
def test_a_group_that_does_not_say_what_it_caches_limits_all_the_same(groups: Path, stat: str | None) -> None:
    group(groups, str(8 * GB), 7 * GB)
    (groups / "memory.stat").unlink()
    if stat is not None:
        (groups / "memory.stat").write_text(stat)
    assert free_bytes(CPU) == 1 * GB


def test_what_this_process_maps_is_known(tmp_path: Path) -> None:
    size = 64 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    before = memory._mapped_bytes()
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        assert sum(mapped[::4096]) == 0
        assert memory._mapped_bytes() - before >= size * 0.9


def test_without_groups_the_machine_is_the_limit(groups: Path) -> None:
    assert free_bytes(CPU) == kv_cache_room(CPU, 0) == 1000 * GB


@pytest.mark.parametrize(("free", "room"), [(24 * GB, 24 * GB - GPU_RESERVE_BYTES - GB), (1 * GB, 0)])
def test_on_a_gpu_steps_come_before_the_cache(monkeypatch: pytest.MonkeyPatch, free: int, room: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GB))
    assert kv_cache_room(torch.device("cuda"), step_bytes=GB) == room


class NoKernels:
    """Replaces a compiled module where only the memory around its launches counts."""

    def launch(self, *arguments: object) -> None:
        pass


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, for as long as they are held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._hold(storage._cdata, storage.nbytes(), 1)
                weakref.finalize(tensor, self._hold, storage._cdata, storage.nbytes(), -1)
        return made

    def _hold(self, storage: int, size: int, change: int) -> None:
        before = self._holders.get(storage, 0)
        self._holders[storage] = before + change
        if 0 in (before, before + change):
            self.now += size * change
            self.peak = max(self.peak, self.now)


def test_a_step_on_a_gpu_takes_what_is_reserved_for_it(tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path, intermediate_size=512, vocab_size=16)
    ops = CudaOps(torch.device("cpu"), lambda source: NoKernels(), attention_ranges=1)
    ops._linear._processors = 1  # no sum is split between thread blocks, as none is for many tokens
    model = Mistral.load(tmp_path, ops)
    cache = model.allocate_cache(16, 16)
    step(model, cache, [(Sequence(list(range(16))), [0] * 100)])  # allocates what later steps share
    found = {}
    for tokens in (100, 200):
        with LiveBytes() as live:
            step(model, cache, [(Sequence(list(range(16))), [0] * tokens)])
        found[tokens] = live.peak
    # A few ints per token come on top.
    assert 1 <= (found[200] - found[100]) / activation_bytes(config, 100) < 1.03


@pytest.mark.gpu
def test_what_packing_needs_leaves_no_gaps_between_the_weights(tmp_path: Path) -> None:
    raw = {**CONFIG, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    raw |= {"num_key_value_heads": 8, "quantization_config": {**CONFIG["quantization_config"], "group_size": 128}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    expected = expected_tensors(ModelConfig.from_dict(raw)).items()
    zeros = {name: torch.zeros(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in expected}
    save_file(zeros, tmp_path / "model.safetensors")
    ops = CudaOps.on_gpu()
    finish_loading(ops.device)
    held, used = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    model = Mistral.load(tmp_path, ops)
    finish_loading(ops.device)
    held, used = torch.cuda.memory_reserved() - held, torch.cuda.memory_allocated() - used
    assert used <= held < used * 1.1
    del model
