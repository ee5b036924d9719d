"""The kernels' shared library: found in a cache, or compiled by the system's C++ compiler."""

import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from starling.errors import DeviceError
from starling.model.ops.build_cache import locked, user_cache

log = logging.getLogger(__name__)

NATIVE = Path(__file__).parent / "native"
# -ffp-contract=off: the compiler must not fuse a product and a sum in one tile and not in another.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")
ARM_DOT = "-march=armv8.2-a+dotprod"
ZIG_SPELLING = {ARM_DOT: "-mcpu=generic+dotprod"}  # zig's own names of processors
# kernels.cpp is compiled once with each of these; isa.cpp chooses among them at run time.
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512vnni": (*AVX512, "-mavx512vnni"),
        "avx512": AVX512,
        "avxvnni": (*AVX2, "-mavxvnni"),
        "avx2": AVX2,
        "portable": (),
    },
    "aarch64": {"neondot": (ARM_DOT,), "portable": ()},
}
SOURCES = ("api.cpp", "context.cpp", "isa.cpp", "pool.cpp", "repack.cpp", "sampling.cpp")
COMPILE_TIMEOUT_S = 1800  # against one that hangs: beside much other work it took more than 300


class NoCompilerError(DeviceError):
    """This machine has no C++ compiler that can build the kernels."""


def library_path(cache: Path | None = None) -> Path:
    """The compiled library, built first if the cache lacks it. Raises NoCompilerError.

    The cache's key covers the sources, the flags and the architecture; not the compiler, which an image may drop after
    its build. Two processes that start together compile once; the file appears by renaming, whole.
    """
    try:
        folder = cache or user_cache()
    except DeviceError as error:
        raise NoCompilerError(str(error)) from error
    path = folder / f"starling-cpu-{_key()}{'.dylib' if sys.platform == 'darwin' else '.so'}"
    if path.exists():
        return path
    compiler = find_compiler()
    if compiler is None:
        raise NoCompilerError(
            "No C++ compiler (c++, g++, clang++ or the ziglang package) was found, so the CPU kernels cannot be built: "
            "install one, for instance `apt-get install g++` or `pip install ziglang`."
        )
    with locked(folder / f"{path.name}.lock"):
        if not path.exists():
            _compile(compiler, path)
    return path


def find_compiler() -> tuple[str, ...] | None:
    """The command that compiles C++ here, None where there is none."""
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return (found,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    return None


def _machine() -> str:
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())


def _key() -> str:
    digest = hashlib.sha256()
    for path in sorted(NATIVE.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for part in (*FLAGS, str(INSTRUCTION_SETS), _machine(), sys.platform):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _compile(compiler: tuple[str, ...], path: Path) -> None:
    started = time.monotonic()
    sets = INSTRUCTION_SETS.get(_machine(), {"portable": ()})
    if "ziglang" in compiler:
        sets = {isa: tuple(ZIG_SPELLING.get(flag, flag) for flag in flags) for isa, flags in sets.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        folder = Path(scratch)
        jobs = [
            (folder / f"kernels_{isa}.o", "kernels.cpp", (*flags, f"-DSTARLING_ISA={isa}"))
            for isa, flags in sets.items()
        ]
        jobs += [(folder / f"{Path(source).stem}.o", source, ()) for source in SOURCES]
        log.info("Compiling the CPU kernels with %s (once; kept in %s).", " ".join(compiler), path.parent)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            commands = [
                (*compiler, *FLAGS, *flags, "-c", str(NATIVE / source), "-o", str(out)) for out, source, flags in jobs
            ]
            list(pool.map(_run, commands))
        built = folder / path.name
        objects = [str(out) for out, _, _ in jobs]
        _run((*compiler, "-shared", "-pthread", *objects, "-o", str(built)))
        built.replace(path)
    log.info("Compiled the CPU kernels in %.1f s.", time.monotonic() - started)


def _run(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompilerError(f"{command[0]} could not be run to build the CPU kernels: {error}.") from error
    if result.returncode:
        raise NoCompilerError(
            f"{' '.join(command)} failed, so the CPU kernels cannot be built: {result.stderr.strip()[-2000:]}"
        )
