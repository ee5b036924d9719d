"""The CPU kernels' instruction sets that tests can run: the machine's own, and AMX on emulated tiles."""

import ctypes
import functools
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

from starling.model.ops.cpu import CpuOps, library
from starling.model.ops.cpu.compiler import FLAGS, NATIVE, find_compiler
from starling.model.ops.cpu.compiler import _machine as machine
from starling.model.ops.cpu.compiler import _run as run

EMULATED = "amx-emulated"
TILES = Path(__file__).parents[1] / "native/emulated_tiles.h"


def instruction_sets() -> list[str]:
    return [*library.usable_instruction_sets(), *([EMULATED] if machine() == "x86_64" else [])]


def ops_of(isa: str, threads: int, precision: str, kv_dtype: torch.dtype = torch.float16) -> CpuOps:
    if isa != EMULATED:
        return CpuOps(threads, precision, kv_dtype, isa)  # type: ignore[arg-type]
    context, _ = library.load("portable")
    kernels = ctypes.addressof(ctypes.c_char.in_dll(_emulated(), "starling_kernels"))
    with patch.multiple(library, usable_instruction_sets=lambda: (isa,), load_best=lambda _: (isa, context, kernels)):
        return CpuOps(threads, precision, kv_dtype, isa)  # type: ignore[arg-type]


@functools.cache
def _emulated() -> ctypes.CDLL:
    """kernels.cpp with a matrix unit, on the portable vectors, so that any x86 machine runs it."""
    command = (*(find_compiler() or ()), *FLAGS, "-O1", "-mamx-tile", "-mamx-int8", "-include", str(TILES), "-shared")
    with tempfile.TemporaryDirectory() as folder:  # the library stays loaded
        path = f"{folder}/kernels.so"
        run((*command, str(NATIVE / "kernels.cpp"), "-o", path))
        return ctypes.CDLL(path)
