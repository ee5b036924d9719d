"""The C interface of native/api.cpp and isa.cpp, in ctypes."""

import ctypes
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from starling.model.ops.cpu.compiler import NoCompilerError, library_paths

log = logging.getLogger(__name__)

POINTER, INT64, INT32, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Linear(ctypes.Structure):
    """`struct Linear` of types.h."""

    _fields_ = (
        ("weight", POINTER), ("scales", POINTER), ("zeros", POINTER),
        ("rows", INT64), ("columns", INT64), ("group", INT64), ("bits", INT64),
    )  # fmt: skip


class Step(ctypes.Structure):
    """`struct Step` of types.h."""

    _fields_ = (
        ("tokens", INT64), ("requests", INT64), ("table_stride", INT64), ("rows", INT64), ("positions", POINTER),
        ("slots", POINTER), ("query_starts", POINTER), ("context_lens", POINTER), ("block_tables", POINTER),
        ("prompt_tokens", POINTER), ("logit_rows", POINTER),
    )  # fmt: skip


class Shape(ctypes.Structure):
    """`struct Shape` of types.h."""

    _fields_ = (
        ("hidden", INT64), ("intermediate", INT64), ("heads", INT64), ("kv_heads", INT64), ("dim", INT64),
        ("window", INT64), ("block_size", INT64), ("half", INT64), ("eps", FLOAT),
    )  # fmt: skip


class Layer(ctypes.Structure):
    """`struct Layer` of types.h."""

    _fields_ = (
        ("input_norm", POINTER), ("qkv", POINTER), ("out", POINTER), ("post_attention_norm", POINTER),
        ("gate_up", POINTER), ("down", POINTER), ("keys", POINTER), ("values", POINTER),
    )  # fmt: skip


# name → (result, arguments)
FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "starling_open": (POINTER, (INT32, POINTER)),
    "starling_close": (None, (POINTER,)),
    "starling_linear": (None, (POINTER, POINTER, POINTER, INT64, POINTER, INT32, POINTER)),
    "starling_add_norm": (None, (POINTER, POINTER, POINTER, POINTER, POINTER, INT64, INT64, FLOAT)),
    "starling_rotate_and_write": (None, (POINTER,) * 8),
    "starling_attention": (None, (POINTER,) * 7),
    "starling_silu_mul": (None, (POINTER, POINTER, POINTER, INT64, INT64)),
    "starling_embed": (None, (POINTER, POINTER, POINTER, POINTER, INT64, INT64)),
    "starling_sample": (None, (POINTER, POINTER, INT64, INT64) + (POINTER,) * 6),
    "starling_layers": (None, (POINTER, POINTER, INT64, POINTER, POINTER, POINTER, INT32, POINTER, POINTER)),
    "starling_pack_awq": (None, (POINTER,) * 5),
    "starling_pack_half": (None, (POINTER,) * 3),
}


@lru_cache
def load(isa: str) -> tuple[ctypes.CDLL, int]:
    """The library that calls the kernels, its functions' types declared, and the address of the kernels for `isa`.

    Both are compiled first if need be. Raises NoCompilerError.
    """
    library, kernels = map(_open, library_paths("context", isa))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, ctypes.addressof(ctypes.c_char.in_dll(kernels, "starling_kernels"))


def load_best(sets: Sequence[str]) -> tuple[str, ctypes.CDLL, int]:
    """The first of `sets` that the compiler supports, and what `load` returns for it. Raises NoCompilerError."""
    for isa in sets[:-1]:
        try:
            return isa, *load(isa)
        except NoCompilerError as error:
            log.warning("Kernels for %s, which this machine has, cannot be built; using the next best. %s", isa, error)
    return sets[-1], *load(sets[-1])


@lru_cache(maxsize=1)
def usable_instruction_sets() -> tuple[str, ...]:
    """The names that CpuOps' `isa` accepts on this machine, best first. Raises NoCompilerError."""
    (path,) = library_paths("isa")
    library = _open(path)
    usable, refused = library.starling_usable_isa, library.starling_refused_isa
    usable.restype, usable.argtypes, refused.restype = ctypes.c_char_p, (INT32,), ctypes.c_char_p
    found: list[str] = []
    while (name := usable(len(found))) is not None:
        found.append(name.decode())
    if (name := refused()) is not None:
        text = "This machine has %s, but Linux refuses it to this process (arch_prctl); using the next best, %s."
        log.warning(text, name.decode(), found[0])
    return tuple(found)


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:  # most likely its folder is mounted noexec
        raise NoCompilerError(
            f"The CPU kernels cannot be loaded: {error}. Give this user a home that is not mounted noexec."
        ) from error
