"""The CPU kernels' instruction sets that tests can run: the machine's own, and AMX on emulated tiles."""

import ctypes
import functools
import hashlib
from pathlib import Path
from unittest.mock import patch

import torch

from starling.model.ops.build_cache import cached_build
from starling.model.ops.cpu import CpuOps, library
from starling.model.ops.cpu.compiler import FLAGS, NATIVE, find_compiler
from starling.model.ops.cpu.compiler import _key as key
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
    """kernels.cpp with a matrix unit on the portable vectors, so that any x86 machine can run it; cached."""
    flags = (*FLAGS, "-O1", "-mamx-tile", "-mamx-int8", "-shared")
    digest = hashlib.sha256(repr((key(), flags)).encode() + TILES.read_bytes())

    def build(path: Path) -> None:
        compiler = find_compiler() or ()
        run((*compiler, *flags, "-include", str(TILES), str(NATIVE / "kernels.cpp"), "-o", str(path)))

    return ctypes.CDLL(str(cached_build(f"starling-emulated-amx-{digest.hexdigest()[:20]}.so", build)))
