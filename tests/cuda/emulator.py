"""The CUDA kernels on a CPU: a .cu file compiled as C++ against emulated_device.h, behind the launches of `Module`."""

import ctypes
import hashlib
import random
import re
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path

import torch

from starling.model.ops.build_cache import locked, user_cache
from starling.model.ops.cpu.compiler import find_compiler
from starling.model.ops.cuda import CudaOps
from starling.model.ops.cuda.driver import Arguments
from starling.model.ops.cuda.module import Argument, Grid
from starling.model.ops.cuda.nvrtc import NATIVE

HEADER = Path(__file__).with_name("emulated_device.h")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", "-ffp-contract=off")
MOST_EARLY = 3  # blocks
KERNEL = re.compile(r"^KERNEL\([^)]*\)\s*(\w+)\(", re.MULTILINE)
# Of each kernel, and of a file.
KERNEL_CALLS = """extern "C" void* make_{0}(unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared_bytes,
                                void** arguments) {{
  const auto kernel = [](void** a) {{ emulator::call({0}, a); }};
  return new emulator::Launch{{kernel, arguments, {{x, y, z}}, threads, shared_bytes}};
}}"""
CALLS = """extern "C" const char* begin(void* launch, unsigned early, unsigned long long seed) {
  return emulator::begin(*(emulator::Launch*)launch, early, seed);
}
extern "C" const char* end(void* launch) { return emulator::end(*(emulator::Launch*)launch); }
extern "C" void forget(void* launch) { delete (emulator::Launch*)launch; }"""


class EmulatedModule:
    """Blocks and threads run in random order, drawn from `seed`. A fault raises AssertionError.

    Launches run at once; or on a `stream`, in its own time.
    """

    def __init__(self, source: Path | str, seed: int | None = None, stream: "EmulatedStream | None" = None) -> None:
        path = NATIVE / f"{source}.cu" if isinstance(source, str) else source
        self._library = ctypes.CDLL(str(build(path)))
        self._random = random.Random(seed)
        self._stream = stream

    def launch(self, kernel: str, grid: Grid, threads: int, shared_bytes: int, *arguments: Argument) -> None:
        launch = EmulatedLaunch(self._library, kernel, (*grid, threads, shared_bytes), arguments)
        early = self._random.randint(1, MOST_EARLY) if self._stream else 0
        launch.begin(early, self._random.getrandbits(64))
        if self._stream:
            self._stream.add(launch)
        else:
            launch.end()


class EmulatedLaunch:
    """One kernel's run: some of its blocks may begin long before the rest."""

    def __init__(
        self, library: ctypes.CDLL, kernel: str, numbers: tuple[int, ...], arguments: tuple[Argument, ...]
    ) -> None:
        self._library, self._kernel = library, kernel
        self._alive = arguments, Arguments(arguments)
        make = library[f"make_{kernel}"]
        make.restype = ctypes.c_void_p
        self._launch = ctypes.c_void_p(make(*map(ctypes.c_uint, numbers), self._alive[1]))

    def begin(self, early: int, seed: int) -> None:
        self._check("begin", ctypes.c_uint(early), ctypes.c_uint64(seed))

    def end(self) -> None:
        self._check("end")

    def __del__(self) -> None:
        self._library["forget"](self._launch)

    def _check(self, what: str, *arguments: object) -> None:
        call = self._library[what]
        call.restype = ctypes.c_char_p
        fault = call(self._launch, *arguments)
        assert fault is None, f"{self._kernel}: {fault.decode()}"


class EmulatedStream:
    """Kernels as they follow one another from sm_90 on: some blocks begin when the kernel before has yet to run.

    What torch does with the tensors on the way does not wait its turn: leave that until `synchronize`.
    """

    def __init__(self) -> None:
        self._latest: EmulatedLaunch | None = None

    def add(self, begun: EmulatedLaunch) -> None:
        self.synchronize()
        self._latest = begun

    def synchronize(self) -> None:
        if self._latest:
            self._latest.end()
        self._latest = None


@lru_cache(maxsize=16)
def build(path: Path) -> Path:
    """The shared library of a .cu file's emulated kernels."""
    kernels = map(KERNEL_CALLS.format, KERNEL.findall(path.read_text()))
    text = "\n".join([f'#include "{HEADER}"', f'#include "{path}"', *kernels, CALLS])
    return compiled(path.stem, text, (HEADER, path, *sorted(NATIVE.glob("*.h"))))


def compiled(name: str, text: str, parts: Iterable[Path]) -> Path:
    """The shared library of the C++ `text`, which includes `parts`, from a cache if it is there."""
    compiler = find_compiler()
    assert compiler is not None
    digest = hashlib.sha256(repr((FLAGS, text)).encode())
    for part in parts:
        digest.update(part.read_bytes())
    built = user_cache() / f"starling-emulated-{name}-{digest.hexdigest()[:20]}.so"
    with locked(built.with_suffix(".lock")):
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
                wrapper = Path(scratch) / "wrapper.cpp"
                wrapper.write_text(text)
                command = [*compiler, *FLAGS, f"-I{NATIVE}", str(wrapper), "-o", f"{scratch}/built.so"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert not done.returncode, done.stderr
                Path(scratch, "built.so").replace(built)
    return built


def emulated_ops(stream: EmulatedStream | None = None) -> CudaOps:
    """CudaOps on the CPU. The attention's work is cut for six blocks, so that pieces meet."""
    load = cache(lambda source: EmulatedModule(source, stream=stream))
    return CudaOps(torch.device("cpu"), load, attention_ranges=6)
