"""The CUDA kernels on a CPU, behind `Module`'s launches.

What runs is the PTX that NVRTC makes of a .cu file: the instructions that the sources spell out, and what NVIDIA's
compiler kept, moved and merged around them. Only the assembler's work and the device itself are missing.
"""

import ctypes
import hashlib
import random
import re
import subprocess
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import torch

from starling.model.ops.build_cache import cached_build
from starling.model.ops.cpu.compiler import find_compiler
from starling.model.ops.cuda import CudaOps
from starling.model.ops.cuda.driver import Kernel
from starling.model.ops.cuda.module import Argument, Grid
from starling.model.ops.cuda.nvrtc import NATIVE
from starling.model.ops.cuda.nvrtc import _key as nvrtc_key
from tests.cuda import ptx
from tests.cuda.ptx import ptx_of, translate

HEADER = Path(__file__).with_name("emulated_device.h")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", "-ffp-contract=off")
MAX_EARLY = 3  # blocks
KERNEL = re.compile(r"^KERNEL\([^)]*\)\s*(\w+)\(", re.MULTILINE)
# The entry points for each kernel, and for a file.
KERNEL_CALLS = """extern "C" void* make_{0}(unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared_bytes,
                                void** arguments) {{
  return new emulator::Launch{{{0}, arguments, {{x, y, z}}, threads, shared_bytes}};
}}"""
CALLS = """extern "C" const char* begin(void* launch, unsigned early, unsigned long long seed) {
  return emulator::begin(*(emulator::Launch*)launch, early, seed);
}
extern "C" const char* end(void* launch) { return emulator::end(*(emulator::Launch*)launch); }
extern "C" void give(void* launch, unsigned long long from, unsigned long long to) {
  ((emulator::Launch*)launch)->global.given.emplace_back(from, to);
}
extern "C" void forget(void* launch) { delete (emulator::Launch*)launch; }
extern "C" void set_counting(bool on) { emulator::counting = on, emulator::passes = {}; }
extern "C" emulator::Passes counted() { return emulator::passes; }"""


class Passes(ctypes.Structure):
    """Passes of warps through shared memory: how many there were, and how many it takes without bank conflicts."""

    _fields_ = (("least", ctypes.c_uint64), ("taken", ctypes.c_uint64))
    least: int
    taken: int


class EmulatedModule:
    """Blocks and threads run in random order, drawn from `seed`. A fault raises AssertionError.

    Launches run at once, as compiled for an A40, or on a `stream`, when their turn comes, as compiled for an H100.
    """

    def __init__(self, source: Path | str, seed: int | None = None, stream: "EmulatedStream | None" = None) -> None:
        path = NATIVE / f"{source}.cu" if isinstance(source, str) else source
        self._library = ctypes.CDLL(str(build(path, 90 if stream else 86)))
        self._random = random.Random(seed)
        self._stream = stream

    def count(self, work: Callable[[], object]) -> Passes:
        """The passes of the launches that `work` makes."""
        self._library["set_counting"](True)
        work()
        counted = self._library["counted"]
        counted.restype = Passes
        found: Passes = counted()
        self._library["set_counting"](False)
        return found

    def launch(self, kernel: str, grid: Grid, threads: int, shared_bytes: int, *arguments: Argument) -> None:
        assert min(grid) > 0, f"{kernel}: the driver refuses a grid of {grid}"
        launch = EmulatedLaunch(self._library, kernel, (*grid, threads, shared_bytes), arguments)
        early = self._random.randint(1, MAX_EARLY) if self._stream else 0
        launch.begin(early, self._random.getrandbits(64))
        if self._stream:
            self._stream.add(launch)
        else:
            launch.end()


class EmulatedLaunch:
    """One launch of a kernel: some of its blocks may begin long before the rest."""

    def __init__(
        self, library: ctypes.CDLL, kernel: str, numbers: tuple[int, ...], arguments: tuple[Argument, ...]
    ) -> None:
        self._library, self._kernel = library, kernel
        assert all(x.is_contiguous() for x in arguments if isinstance(x, torch.Tensor)), kernel
        self._alive = arguments, Kernel(ctypes.c_void_p())
        addresses = self._alive[1].place(arguments)
        make = library[f"make_{kernel}"]
        make.restype = ctypes.c_void_p
        self._launch = ctypes.c_void_p(make(*map(ctypes.c_uint, numbers), addresses))
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor):
                begin = tensor.data_ptr()
                library["give"](self._launch, *map(ctypes.c_uint64, (begin, begin + tensor.nbytes)))

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
    """Kernels as they follow one another from sm_90 on: some blocks begin before the previous kernel has run.

    torch's own operations on the tensors are not queued: leave them until after `synchronize`.
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


@lru_cache(maxsize=32)
def build(path: Path, arch: int) -> Path:
    """The shared library of a .cu file's kernels, as compiled for compute capability `arch`."""
    source = str(path.with_suffix(""))

    def text() -> str:
        kernels = map(KERNEL_CALLS.format, KERNEL.findall(path.read_text(encoding="utf-8")))
        return "\n".join(["using namespace emulator;", translate(ptx_of(source, arch)), *kernels, CALLS])

    # The key is of what the text is made from, since making it takes a second, in NVRTC and in translate.
    translators = [Path(file).read_bytes() for file in (ptx.__file__, __file__)]
    return compiled(f"{path.stem}-{arch}", HEADER, text, key=(nvrtc_key(source), translators))


def compiled(
    name: str, header: Path, text: Callable[[], str] = lambda: "", key: object = None, flags: tuple[str, ...] = ()
) -> Path:
    """The shared library built from C++, `text` after `header`; from the cache, which checkouts share, if it is there.

    `key` changes with the text, which is made only if the library is not found.
    """
    compiler = find_compiler()
    assert compiler is not None
    digest = hashlib.sha256(repr((FLAGS, flags, key)).encode() + header.read_bytes())

    def build(path: Path) -> None:
        wrapper = path.with_suffix(".cpp")
        wrapper.write_text(text())
        command = [*compiler, *FLAGS, *flags, "-include", str(header), str(wrapper), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr

    return cached_build(f"starling-emulated-{name}-{digest.hexdigest()[:20]}.so", build)


def emulated_ops(stream: EmulatedStream | None = None) -> CudaOps:
    """CudaOps on the CPU. Attention's work is cut for six blocks, so that there are pieces to combine."""
    load = cache(lambda source: EmulatedModule(source, stream=stream))
    return CudaOps(torch.device("cpu"), load, attention_ranges=6)
