"""The kernels' shared libraries: found in a cache, or compiled by the system's C++ compiler."""

import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from starling.errors import DeviceError
from starling.model.ops.build_cache import cached_build

log = logging.getLogger(__name__)

NATIVE = Path(__file__).parent / "native"
# -ffp-contract=off: the compiler must not fuse a multiply and an add in one tile but not in another.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")
AVX512_VNNI = (*AVX512, "-mavx512vnni")
ARM_DOT, ARM_I8MM = "-march=armv8.2-a+dotprod", "-march=armv8.2-a+dotprod+i8mm"
ZIG_SPELLING = {ARM_DOT: "-mcpu=generic+dotprod", ARM_I8MM: "-mcpu=generic+dotprod+i8mm"}  # zig's names
# kernels.cpp is compiled for each of these; isa.cpp says which ones the machine has, best first.
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "amx": (*AVX512_VNNI, "-mamx-tile", "-mamx-int8"),
        "avx512vnni": AVX512_VNNI,
        "avx512": AVX512,
        "avxvnni": (*AVX2, "-mavxvnni"),
        "avx2": AVX2,
        "portable": (),
    },
    "aarch64": {"neoni8mm": (ARM_I8MM,), "neondot": (ARM_DOT,), "portable": ()},
}
# The other libraries: the code that calls the kernels, and the code that says which of them can run.
SOURCES = {"context": ("api.cpp", "context.cpp", "pool.cpp", "repack.cpp", "sampling.cpp"), "isa": ("isa.cpp",)}
COMPILE_TIMEOUT_S = 1800  # against a hung compiler; on a busy machine compiling took more than 300


class NoCompilerError(DeviceError):
    """This machine has no C++ compiler that can build the kernels."""


def library_paths(*parts: str, cache: Path | None = None) -> list[Path]:
    """The compiled libraries of `parts`; those that the cache lacks are built, in parallel. Raises NoCompilerError.

    A part is "context", "isa", or an instruction set for its kernels. The cache key covers the sources, the flags and
    the architecture, but not the compiler, which an image may drop after its build.
    """
    key, suffix = _key(), ".dylib" if sys.platform == "darwin" else ".so"

    def path(part: str) -> Path:
        return cached_build(f"starling-cpu-{key}-{part}{suffix}", lambda path: _build(part, path), cache)

    try:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            return list(pool.map(path, parts))
    except NoCompilerError:
        raise
    except DeviceError as error:
        raise NoCompilerError(str(error)) from error


def compile_ahead(cache: Path | None = None) -> None:
    """Compile every library for this architecture, for machines that may lack a compiler. Raises NoCompilerError."""
    library_paths(*SOURCES, *_instruction_sets(), cache=cache)


def find_compiler() -> tuple[str, ...] | None:
    """The command that compiles C++ here, or None."""
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return (found,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    return None


def _machine() -> str:
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())


@lru_cache(maxsize=1)  # called twice at startup, and it reads every source
def _key() -> str:
    digest = hashlib.sha256()
    for path in sorted(NATIVE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (*FLAGS, str(INSTRUCTION_SETS), str(SOURCES), _machine(), sys.platform):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _instruction_sets() -> dict[str, tuple[str, ...]]:
    return INSTRUCTION_SETS.get(_machine(), {"portable": ()})


def _build(part: str, path: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        raise NoCompilerError(
            "No C++ compiler (c++, g++, clang++ or the ziglang package) was found, so the CPU kernels cannot be built: "
            "install one, for instance `apt-get install g++` or `pip install ziglang`."
        )
    _compile(compiler, part, path)


def _compile(compiler: tuple[str, ...], part: str, path: Path) -> None:
    started = time.monotonic()
    sources, flags = SOURCES.get(part, ("kernels.cpp",)), _instruction_sets().get(part, ())
    if "ziglang" in compiler:
        flags = tuple(ZIG_SPELLING.get(flag, flag) for flag in flags)
    log.info("Compiling the CPU kernels (%s) with %s (once).", part, " ".join(compiler))
    _run((*compiler, *FLAGS, *flags, "-shared", *(str(NATIVE / source) for source in sources), "-o", str(path)))
    log.info("Compiled the CPU kernels (%s) in %.1f s.", part, time.monotonic() - started)


def _run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompilerError(f"{command[0]} could not be run to build the CPU kernels: {error}.") from error
    if result.returncode:
        raise NoCompilerError(
            f"{' '.join(command)} failed, so the CPU kernels cannot be built: {result.stderr.strip()[-2000:]}"
        )
