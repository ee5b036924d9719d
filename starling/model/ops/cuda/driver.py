"""The CUDA driver: machine code → kernels that can be launched on torch's stream."""

import ctypes
import struct
from collections.abc import Callable
from functools import lru_cache, partial

import torch

from starling.errors import DeviceError
from starling.model.ops.cuda import nvrtc
from starling.model.ops.cuda.device import architecture
from starling.model.ops.cuda.module import Argument, Grid

LIBRARY = "libcuda.so.1"
MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_MEMORY_CARVEOUT, MAX_SHARED = 9, 100  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT; percent
DEFAULT_SHARED_BYTES = 48 << 10  # what a kernel may use without a request for more
# The first architecture whose kernels may begin before the previous one has ended; and CUDA 12.3, as a driver encodes
# its version, the first whose graphs have edges for that (programming guide, "Edge Data").
OVERLAPPING_ARCH, OVERLAPPING_DRIVER = 90, 12030
# CUlaunchConfig: blocks [3], threads of a block [3], bytes of shared memory; stream, attributes, their number.
_CONFIG = struct.Struct("@7IPPI0P")
# CUlaunchAttribute: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, then 64 bytes that hold the value, 1.
_OVERLAP = ctypes.create_string_buffer(struct.pack("@i4xi60x", 6, 1), 72)


class DriverModule:
    """Kernels on one GPU, launched by one thread at a time. Raises DeviceError."""

    def __init__(self, code: bytes, stream: Callable[[], int], overlap: bool) -> None:
        """Load `code` (a cubin, or PTX) into the current context. `stream` returns the current stream's handle.
        `overlap`: kernels may begin while the previous one runs (see native/device.h); can_overlap must allow it."""
        self._cuda, self._launch, self._stream = _library(), _launch_kernel(), stream
        self._attributes = ctypes.addressof(_OVERLAP), int(overlap)
        self._module = ctypes.c_void_p()
        _check(self._cuda.cuModuleLoadData(ctypes.byref(self._module), code), "load", "the kernels")
        self._kernels: dict[str, Kernel] = {}

    @classmethod
    def on_gpu(cls, source: str, device: torch.device, overlap: bool = True) -> "DriverModule":
        """native/`source`.cu on `device` and torch's current stream there. `overlap`: kernels overlap if they can."""
        code = nvrtc.cubin(source, architecture(device))
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # makes torch create the context that the module is loaded into
            # Like torch.cuda.current_stream(), without the objects that it creates on every call.
            stream = partial(torch._C._cuda_getCurrentRawStream, torch.cuda.current_device())
            return cls(code, stream, overlap and can_overlap(device))

    def launch(self, kernel: str, grid: Grid, threads: int, shared_bytes: int, *arguments: Argument) -> None:
        found = self._kernels.get(kernel) or self._find(kernel)
        if shared_bytes > found.shared_bytes:
            result = self._cuda.cuFuncSetAttribute(found.function, MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
            _check(result, "reserve", f"{shared_bytes} bytes of shared memory for {kernel}")
            found.shared_bytes = shared_bytes
        config = _CONFIG.pack(*grid, threads, 1, 1, shared_bytes, self._stream(), *self._attributes)
        _check(self._launch(config, found.function, found.place(arguments), None), "launch", kernel)

    def _find(self, kernel: str) -> "Kernel":
        function = ctypes.c_void_p()
        result = self._cuda.cuModuleGetFunction(ctypes.byref(function), self._module, kernel.encode())
        _check(result, "find", kernel)
        # Attention's count of resident blocks relies on it. And kernels that overlap must split a multiprocessor's
        # memory the same way: otherwise each gets the split that suits it, and "a kernel with a different preference"
        # may wait for the device (cudaFuncSetCacheConfig's documentation). L1 carries little here.
        result = self._cuda.cuFuncSetAttribute(function, SHARED_MEMORY_CARVEOUT, MAX_SHARED)
        _check(result, "set", f"the shared-memory carveout of {kernel}")
        self._kernels[kernel] = Kernel(function)
        return self._kernels[kernel]


class Kernel:
    """A kernel's handle, and memory for the arguments of one launch at a time: the driver copies them.

    A prompt's step launches hundreds of kernels, and the host easily becomes slower than the device: writing into the
    same memory takes a third of the time that making it takes.
    """

    def __init__(self, function: ctypes.c_void_p) -> None:
        self.function = function
        self.shared_bytes = DEFAULT_SHARED_BYTES
        self._layout = struct.Struct("")
        self._values = ctypes.create_string_buffer(0)
        self._addresses = (ctypes.c_void_p * 0)()

    def place(self, arguments: tuple[Argument, ...]) -> "ctypes.Array[ctypes.c_void_p]":
        """The addresses of `arguments`' values, eight bytes each, of which a kernel reads as many as it takes."""
        if len(arguments) != len(self._addresses):  # the first launch; of one kernel, all have the same types
            self._layout = struct.Struct("=" + "".join(map(_code, arguments)))
            self._values = ctypes.create_string_buffer(self._layout.size)
            begin = ctypes.addressof(self._values)
            self._addresses = (ctypes.c_void_p * len(arguments))(*range(begin, begin + self._layout.size, 8))
        words = [argument.data_ptr() if type(argument) is torch.Tensor else argument or 0 for argument in arguments]
        self._layout.pack_into(self._values, 0, *words)
        return self._addresses


def _code(argument: Argument) -> str:
    """How the struct module writes it into eight bytes."""
    kind = type(argument)
    assert argument is None or kind in (torch.Tensor, int, float), kind
    return {int: "i4x", float: "f4x"}.get(kind, "Q")


def can_overlap(device: torch.device) -> bool:
    """Whether kernels on `device` can begin before the previous one has ended, in graphs too. Raises DeviceError."""
    return supports_overlap(architecture(device), driver_version())


def driver_version() -> int:
    """The newest CUDA that the driver supports: 12030 for 12.3. Raises DeviceError if there is no driver."""
    version = ctypes.c_int()
    _check(_library().cuDriverGetVersion(ctypes.byref(version)), "report", "its version")
    return version.value


def supports_overlap(arch: int, driver: int) -> bool:
    """`arch` is 90 for compute capability 9.0, `driver` 12030 for CUDA 12.3."""
    return arch >= OVERLAPPING_ARCH and driver >= OVERLAPPING_DRIVER


def _check(result: int, action: str, what: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(result, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise DeviceError(f"The CUDA driver could not {action} {what}: {reason} ({result}).")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DeviceError(f"The NVIDIA driver ({LIBRARY}) cannot be loaded: {error}.") from error
    pointer = ctypes.c_void_p
    library.cuFuncSetAttribute.argtypes = (pointer, ctypes.c_int, ctypes.c_int)
    library.cuModuleGetFunction.argtypes = (pointer, pointer, ctypes.c_char_p)
    library.cuModuleLoadData.argtypes = (pointer, ctypes.c_char_p)
    return library


@lru_cache(maxsize=1)
def _launch_kernel() -> Callable[[bytes, ctypes.c_void_p, "ctypes.Array[ctypes.c_void_p]", None], int]:
    """cuLaunchKernelEx, called without releasing the GIL: otherwise another thread could take it at each of a step's
    launches, for up to 5 ms, and a launch only queues work."""
    function = ctypes.PyDLL(LIBRARY).cuLaunchKernelEx
    function.argtypes = (ctypes.c_char_p, *(ctypes.c_void_p,) * 3)
    return function
