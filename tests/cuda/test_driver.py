"""DriverModule without a GPU: on emulated_driver.cpp, which takes the machine code that a GPU would."""

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from starling.errors import DeviceError
from starling.model.mistral import Mistral
from starling.model.ops.cuda import CudaOps, driver, nvrtc
from starling.model.ops.cuda.driver import DriverModule, driver_version, supports_overlap
from starling.model.ops.cuda.module import Argument, Grid
from starling.model.ops.cuda.sampling import settings_of
from tests.cuda.emulator import KERNEL, build, compiled, emulated_ops
from tests.model.sequences import Sequence, batch_of, step
from tests.model.tiny import write_checkpoint

SOURCE = Path(__file__).with_name("emulated_driver.cpp")
PROBE = str(Path(__file__).with_name("probe"))  # works like a source in native/, because its path is absolute
LAUNCHED = (
    "gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ", "sharedMemBytes", "hStream", "numAttrs",
    "id", "programmaticStreamSerializationAllowed", "carveout",
)  # fmt: skip


def machine_code(source: str, architecture: int) -> bytes:
    return nvrtc.compile_source(PROBE, architecture)[0] if source == PROBE else nvrtc.cubin(source, architecture)


class CheckedModule(DriverModule):
    """Checks that a kernel is launched with arguments of the number and sizes of its machine code's parameters."""

    parameter_bytes: dict[str, list[int]]

    def launch(self, kernel: str, grid: Grid, threads: int, shared_bytes: int, *arguments: Argument) -> None:
        sizes = [8 if argument is None or isinstance(argument, torch.Tensor) else 4 for argument in arguments]
        assert sizes == self.parameter_bytes[kernel], kernel
        super().launch(kernel, grid, threads, shared_bytes, *arguments)


class Machine:
    """The emulated driver, and its GPU."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.stream = 0  # the current one's handle
        self.set(architecture=86, version=13000, failure=0, max_shared_calls=0)

    def set(self, **numbers: int) -> None:
        for name, number in numbers.items():
            ctypes.c_int.in_dll(self._library, name).value = number

    def load(self, source: str, overlap: bool = False) -> CheckedModule:
        path = nvrtc.NATIVE / f"{source}.cu"
        architecture = ctypes.c_int.in_dll(self._library, "architecture").value
        kernels = ctypes.CDLL(str(build(path, 90 if architecture >= 90 else 86)))
        ctypes.c_void_p.in_dll(self._library, "library").value = kernels._handle
        module = CheckedModule(machine_code(source, architecture), lambda: self.stream, overlap)
        names = KERNEL.findall(path.read_text(encoding="utf-8"))
        module.parameter_bytes = {name: self._parameter_bytes(name) for name in names}
        return module

    def _parameter_bytes(self, kernel: str) -> list[int]:
        found = (ctypes.c_int * 64)()
        return found[: self._library.parameter_bytes(kernel.encode(), found)]

    @property
    def launched(self) -> dict[str, int]:
        return dict(zip(LAUNCHED, (ctypes.c_int64 * len(LAUNCHED)).in_dll(self._library, "launched"), strict=True))

    @property
    def max_shared_bytes(self) -> list[int]:
        calls = ctypes.c_int.in_dll(self._library, "max_shared_calls").value
        return (ctypes.c_int * 8).in_dll(self._library, "max_shared_bytes")[:calls]


@pytest.fixture(scope="module")
def library() -> Path:
    return compiled("driver", SOURCE)


@pytest.fixture
def machine(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    caches = driver._library, driver._launch_kernel
    monkeypatch.setattr(driver, "LIBRARY", str(library))
    for each in caches:
        each.cache_clear()
    yield Machine(library)
    for each in caches:  # the machine that runs this may have a driver
        each.cache_clear()


@pytest.fixture
def probe(machine: Machine) -> CheckedModule:
    return machine.load(PROBE)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_launch_arrives_as_it_was_asked_for(machine: Machine, overlap: bool) -> None:
    machine.set(architecture=90)
    x, y = torch.randn(6, 64), torch.empty(6, 64)
    probe = machine.load(PROBE, overlap)
    for machine.stream in (0x7FFE_DCBA_9876, 0):
        probe.launch("reverse", (3, 2, 1), 64, 272, x, y)
        config = (3, 2, 1, 64, 1, 1, 272, machine.stream)
        assert tuple(machine.launched.values()) == (*config, *((1, 6, 1) if overlap else (0, 0, 0)), 100)
    assert torch.equal(y, x.flip(1))


def test_arguments_arrive_as_the_types_of_c(probe: CheckedModule) -> None:
    ints, floats = torch.zeros(5, dtype=torch.int32), torch.zeros(4)
    there = torch.tensor([6.25])
    sent = -3, 0.1, 2**31 - 1, -math.inf, there, -1e-40, -(2**31), None, 0
    probe.launch("parameters", (1, 1, 1), 32, 0, ints, sent[0], floats, *sent[1:])
    assert ints.tolist() == [-3, 2**31 - 1, -(2**31), 0, True]
    assert torch.equal(floats, torch.tensor([0.1, -math.inf, -1e-40, 6.25]))


def test_shared_memory_beyond_the_default_is_requested_when_it_grows(machine: Machine, probe: CheckedModule) -> None:
    def launch(kernel: str, kib: int) -> None:
        x, y = torch.randn(64), torch.empty(64)
        probe.launch(kernel, (1, 1, 1), 32 if kernel == "powers" else 64, kib << 10, x, y)

    launch("powers", 1)
    for kib in (48, 60, 60, 50, 99, 99):
        launch("reverse", kib)
    assert machine.max_shared_bytes == [60 << 10, 99 << 10]
    launch("powers", 49)
    assert machine.max_shared_bytes == [60 << 10, 99 << 10, 49 << 10]


def test_what_the_driver_refuses_is_reported_in_its_words(machine: Machine, probe: CheckedModule) -> None:
    x, y = torch.randn(64), torch.empty(64)

    def launch(x_blocks: int = 1, threads: int = 64, shared_bytes: int = 256) -> None:
        probe.launch("reverse", (x_blocks, 1, 1), threads, shared_bytes, x, y)

    with pytest.raises(DeviceError, match=r"could not load the kernels: device kernel image is invalid \(200\)"):
        DriverModule(b".version 8.0", lambda: 0, False)
    with pytest.raises(DeviceError, match=r"find missing: named symbol not found \(500\)"):
        DriverModule.launch(probe, "missing", (1, 1, 1), 64, 0)
    with pytest.raises(DeviceError, match=r"reserve 101377 bytes of shared memory for reverse: invalid argument \(1\)"):
        launch(shared_bytes=(99 << 10) + 1)
    with pytest.raises(DeviceError, match=r"launch reverse: invalid argument \(1\)"):
        launch(x_blocks=0)
    with pytest.raises(DeviceError, match=r"launch reverse: too many resources requested for launch \(701\)"):
        launch(threads=96)
    machine.set(failure=12345)
    with pytest.raises(DeviceError, match=r"launch reverse: unknown error \(12345\)"):
        launch()
    machine.set(failure=3)
    with pytest.raises(DeviceError, match=r"report its version: .* \(3\)"):
        driver_version()
    machine.set(failure=1)
    with pytest.raises(DeviceError, match="reserve"):
        launch(shared_bytes=60 << 10)
    launch(shared_bytes=60 << 10)  # asks again
    assert torch.equal(y, x.flip(0))
    machine.set(architecture=80)
    with pytest.raises(DeviceError, match=r"no kernel image is available for execution on the device \(209\)"):
        DriverModule(machine_code("norm", 86), lambda: 0, False)


def test_the_drivers_library_is_found_by_its_name(library: Path, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").symlink_to(library)
    code = "from starling.model.ops.cuda.driver import driver_version; print(driver_version())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "13000\n"


def test_without_a_driver(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-of-nobody.so.1")
    with pytest.raises(DeviceError, match=r"driver \(libcuda-of-nobody\.so\.1\) cannot be loaded: .*No such file"):
        driver_version()


def test_kernels_overlap_where_the_gpu_and_the_drivers_graphs_support_it() -> None:
    assert supports_overlap(90, 12030) and supports_overlap(100, 13000)
    assert not supports_overlap(90, 12020)  # R535
    assert not supports_overlap(89, 13000)


@pytest.mark.parametrize(("architecture", "overlap"), [(86, False), (90, True)])
def test_a_model_computes_what_it_does_without_the_driver(
    architecture: int, overlap: bool, machine: Machine, tmp_path: Path
) -> None:
    """To the bit: a prompt and single tokens through all layers, each operation by itself, and what is drawn."""
    machine.set(architecture=architecture)
    sources = set()

    @cache
    def load(source: str) -> CheckedModule:
        sources.add(source)
        return machine.load(source, overlap)

    write_checkpoint(tmp_path, num_hidden_layers=2)
    found, wanted = (
        everything(Mistral.load(tmp_path, ops))
        for ops in (CudaOps(torch.device("cpu"), load, attention_ranges=6), emulated_ops())
    )
    assert all(map(torch.equal, found, wanted))
    assert sources == {"attention", "elementwise", "head", "linear_g64", "norm", "rotary", "sampling"}
    assert machine.launched["numAttrs"] == overlap


def everything(model: Mistral) -> list[torch.Tensor]:
    """The results of each kind of launch."""
    ops, sequence, cache = model.ops, Sequence([5, 0, 3]), model.allocate_cache(8, 16)
    assert isinstance(ops, CudaOps)
    made = []
    for length in (21, 1):
        made += step(model, cache, [(sequence, [(7 * i + 5) % 331 for i in range(length)])])
    prompt = batch_of(model, cache, [(Sequence([1]), [3, 1, 4])])
    made.append(model.forward(replace(prompt, logit_rows=torch.tensor([2])), cache))
    x = made[0][:3, :128].clone()
    made += [ops.silu_and_mul(made[0][:, :320].half()), ops.rms_norm(x, model.norm, 1e-5)]
    made += ops.add_rms_norm(x.half(), x, model.norm, 1e-5)

    sampling = ops.sampling(rows=1, vocabulary=331, sequences=1)
    sampling.count(0, torch.tensor([9, 9, 4], dtype=torch.int32), 2)
    settings = settings_of(*map(np.array, ([0.9], [40], [0.95], [0.01], [0.7])))
    settings["repetition"], settings["frequency"], settings["table"], settings["seen"] = 1, 0.3, 1, 2
    logits, tail = made[1].clone(), torch.tensor([4, 8], dtype=torch.int32)
    drawn = sampling.sample(logits, torch.from_numpy(settings.view(np.uint8).reshape(1, -1)), tail)
    assert logits[0, 4] == made[1][0, 4] - 2 * np.float32(0.3)  # counted once in the table, and once in the tail
    return [*made, logits, drawn]
