"""The CUDA kernels on a CPU: a .cu file compiled as C++ against emulated_device.h, behind the launches of `Module`."""

import ctypes
import hashlib
import random
import re
import subprocess
import tempfile
from collections.abc import Sequence
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
KERNEL = re.compile(r"^KERNEL\([^)]*\)\s*(\w+)\(", re.MULTILINE)
CALL = 'extern "C" const char* run_{0}(unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared_bytes, \
unsigned long long seed, void** arguments) {{ return emulator::run_grid([](void** a) {{ emulator::call({0}, a); }}, \
x, y, z, threads, shared_bytes, seed, arguments); }}'


class EmulatedModule:
    """Launches run at once, blocks and threads in random order, drawn from `seed`. A fault raises AssertionError."""

    def __init__(self, source: Path | str, seed: int | None = None) -> None:
        path = NATIVE / f"{source}.cu" if isinstance(source, str) else source
        self._library = ctypes.CDLL(str(_build(path)))
        self._random = random.Random(seed)

    def launch(self, kernel: str, grid: Grid, threads: int, shared_bytes: int, *arguments: Argument) -> None:
        run = self._library[f"run_{kernel}"]
        run.restype = ctypes.c_char_p
        seed = ctypes.c_uint64(self._random.getrandbits(64))
        fault = run(*map(ctypes.c_uint, (*grid, threads, shared_bytes)), seed, Arguments(arguments))
        assert fault is None, f"{kernel}: {fault.decode()}"


@lru_cache(maxsize=16)
def _build(path: Path, extra_flags: Sequence[str] = ()) -> Path:
    compiler = find_compiler()
    assert compiler is not None
    digest = hashlib.sha256(repr((FLAGS, extra_flags)).encode())
    for part in (HEADER, Path(__file__), path, *sorted(NATIVE.glob("*.h"))):
        digest.update(part.read_bytes())
    built = user_cache() / f"starling-emulated-{path.stem}-{digest.hexdigest()[:20]}.so"
    with locked(built.with_suffix(".lock")):
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
                lines = [
                    f'#include "{HEADER}"',
                    f'#include "{path}"',
                    *map(CALL.format, KERNEL.findall(path.read_text())),
                ]
                wrapper = Path(scratch) / "wrapper.cpp"
                wrapper.write_text("\n".join(lines))
                command = [*compiler, *FLAGS, *extra_flags, f"-I{NATIVE}", str(wrapper), "-o", f"{scratch}/built.so"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert not done.returncode, done.stderr
                Path(scratch, "built.so").replace(built)
    return built


def emulated_ops() -> CudaOps:
    """CudaOps on the CPU. The attention's work is cut for six blocks, so that pieces meet."""
    return CudaOps(torch.device("cpu"), cache(EmulatedModule), attention_ranges=6)
