"""NVIDIA's run-time compiler: a .cu file → machine code for one architecture, cached. Needs no GPU."""

import ctypes
import hashlib
import importlib.util
import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch

from starling.errors import DeviceError
from starling.model.ops.build_cache import cached_build
from starling.model.ops.cpu.cores import usable_cores

log = logging.getLogger(__name__)

NATIVE = Path(__file__).parent / "native"
ARCHS = (80, 86, 89, 90)  # A100; A10, A40, RTX 30; L4, L40, RTX 40; H100
SOURCES = tuple(sorted(path.stem for path in NATIVE.glob("*.cu")))
# Products and sums are rounded as written, with fmaf where a single rounding is meant: what two kernels must agree on
# bit for bit must not depend on which pairs a compiler chooses to contract.
OPTIONS = ("--std=c++17", "--extra-device-vectorization", "--fmad=false")
LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def cubin(source: str, arch: int, cache: Path | None = None) -> bytes:
    """Machine code of native/`source`.cu for compute capability `arch` (86 for 8.6), from the cache if it is there.

    For a GPU newer than the compiler supports it is PTX, which the driver finishes. Raises DeviceError; without NVRTC
    it does so even for cached code, whose key includes NVRTC's version (every CUDA build of torch brings NVRTC).
    """

    def build(path: Path) -> None:
        began_s = time.monotonic()
        path.write_bytes(compile_source(source, arch)[0])
        log.info("Compiled %s.cu for sm_%d in %.1f s.", source, arch, time.monotonic() - began_s)

    return cached_build(f"starling-cuda-{source}-sm{arch}-{_key(source)}.cubin", build, cache).read_bytes()


def compile_ahead(archs: Iterable[int] = ARCHS, cache: Path | None = None) -> None:
    """Compile every kernel for each of `archs` into the cache, as when an image is built. Raises DeviceError."""
    wanted = [(source, arch) for source in SOURCES for arch in archs]
    with ThreadPoolExecutor(usable_cores()) as pool:  # NVRTC compiles in parallel, without the GIL
        list(pool.map(lambda pair: cubin(pair[0], pair[1], cache), wanted))


def compiling(arch: int, cache: Path | None = None) -> dict[str, Future[bytes]]:
    """Each source's machine code as of `cubin`, compiled in parallel while the caller goes on."""
    pool = ThreadPoolExecutor(usable_cores())
    found = {source: pool.submit(cubin, source, arch, cache) for source in SOURCES}
    pool.shutdown(wait=False)
    return found


def compile_source(source: str, arch: int, ptx: bool = False) -> tuple[bytes, str]:
    """Machine code, or PTX if asked for, and the compiler's log, with each kernel's registers and spills."""
    nvrtc = _library()
    supported = _supported(nvrtc)
    known = max((known for known in supported if known <= arch), default=None)
    if known is None:
        raise DeviceError(f"NVRTC supports sm_{min(supported)} and newer, but this GPU is sm_{arch}.")
    virtual = ptx or known != arch
    target = f"--gpu-architecture={'compute' if virtual else 'sm'}_{known}"
    options = [option.encode() for option in (target, *OPTIONS, *(() if virtual else ("--ptxas-options=-v",)))]
    headers = sorted(NATIVE.glob("*.h"))
    contents = (ctypes.c_char_p * len(headers))(*(header.read_bytes() for header in headers))
    names = (ctypes.c_char_p * len(headers))(*(header.name.encode() for header in headers))
    program = ctypes.c_void_p()
    text = (NATIVE / f"{source}.cu").read_bytes()
    _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, f"{source}.cu".encode(), len(headers), contents, names),
    )
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        report = _read(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if result:
            raise DeviceError(f"{source}.cu does not compile for sm_{known}: {report.strip()[-4000:]}")
        return _read(nvrtc, program, "PTX" if virtual else "CUBIN"), report
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def version() -> str:
    """The compiler's version, such as "12.8". Raises DeviceError if there is no compiler."""
    nvrtc = _library()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """NVRTC as torch's CUDA build or the pip package nvidia-cuda-nvrtc brings it, else the system's.

    The one for torch's own CUDA comes first: when torch is replaced by a build for an older driver, pip leaves the old
    NVRTC behind, and that driver runs no machine code of a newer major version (CUDA's "Minor Version Compatibility").
    """
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    bundled = sorted(path for root in roots for path in root.glob("*/lib/libnvrtc.so.*[0-9]"))
    own = f".so.{(torch.version.cuda or '').partition('.')[0]}"
    for name in sorted((*map(str, bundled), *LIBRARIES), key=lambda name: not name.endswith(own)):
        try:
            if name not in LIBRARIES:
                # CUDA 13's package does not tell NVRTC where to find these; torch loads one version's at most.
                for builtins in Path(name).parent.glob("libnvrtc-builtins.so.*[0-9]"):
                    ctypes.CDLL(str(builtins))
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError(
        "NVIDIA's run-time compiler (libnvrtc) was not found, so the CUDA kernels cannot be built: install a CUDA "
        "build of torch, which brings it, or `pip install nvidia-cuda-nvrtc`."
    )


def _supported(nvrtc: ctypes.CDLL) -> list[int]:
    count = ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    archs = (ctypes.c_int * count.value)()
    _check(nvrtc, nvrtc.nvrtcGetSupportedArchs(archs))
    return list(archs)


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    content = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, content))
    return content.raw


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise DeviceError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(result).decode()}.")


def _key(source: str) -> str:
    """Changes with the sources, the options and the compiler: a newer one may compile what an older left as PTX."""
    digest = hashlib.sha256()
    for path in (*sorted(NATIVE.glob("*.h")), NATIVE / f"{source}.cu"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(" ".join((*OPTIONS, version())).encode())
    return digest.hexdigest()[:20]
