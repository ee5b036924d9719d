"""The CUDA driver: machine code → kernels that can be launched on torch's stream."""

import ctypes
import struct
from array import array
from collections.abc import Callable
from functools import lru_cache

import torch

from starling.errors import DeviceError
from starling.model.ops.cuda import nvrtc
from starling.model.ops.cuda.device import architecture
from starling.model.ops.cuda.module import Argument, Grid

MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DEFAULT_SHARED_BYTES = 48 << 10  # what a kernel may use without being asked about it
# The first architecture whose kernels may begin before the one before has ended; and CUDA 12.3, as a driver tells its
# version, the first whose graphs have edges that say so (programming guide, "Edge Data").
OVERLAPPING_ARCH, OVERLAPPING_DRIVER = 90, 12030
_UINT32, _FLOAT32 = struct.Struct("<I"), struct.Struct("<f")
# CUlaunchConfig: the grid, the threads of a block [3], bytes of shared memory; stream, attributes, how many of them.
_CONFIG = struct.Struct("@7IPPI0P")
# CUlaunchAttribute: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, and 64 bytes of value, which is 1.
_OVERLAP = struct.pack("@i4xi60x", 6, 1)


class DriverModule:
    """native/`source`.cu on one GPU. Raises DeviceError."""

    def __init__(self, source: str, device: torch.device, overlap: bool = True) -> None:
        """`overlap`: kernels begin while the one before still runs, where they can (see native/device.h)."""
        self._cuda, self._launch = _library(), _launch_kernel()
        code = nvrtc.cubin(source, architecture(device))
        self._attributes = ctypes.create_string_buffer(_OVERLAP, len(_OVERLAP))
        self._attribute_count = int(overlap and can_overlap(device))
        with torch.cuda.device(device):
            self._device_index = torch.cuda.current_device()
            torch.cuda.synchronize()  # makes torch create the context that the module is loaded into
            self._module = ctypes.c_void_p()
            self._check(self._cuda.cuModuleLoadData(ctypes.byref(self._module), code))
        self._kernels: dict[str, ctypes.c_void_p] = {}
        self._shared_bytes: dict[str, int] = {}

    def launch(self, kernel: str, grid: Grid, threads: int, shared_bytes: int, *arguments: Argument) -> None:
        function = self._kernels.get(kernel) or self._find(kernel)
        if shared_bytes > self._shared_bytes[kernel]:
            self._check(self._cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_BYTES, shared_bytes))
            self._shared_bytes[kernel] = shared_bytes
        # As torch.cuda.current_stream(), without the objects that it makes each time.
        stream = torch._C._cuda_getCurrentRawStream(self._device_index)
        config = _CONFIG.pack(
            *grid, threads, 1, 1, shared_bytes, stream, ctypes.addressof(self._attributes), self._attribute_count
        )
        self._check(self._launch(config, function, Arguments(arguments), None))

    def _find(self, kernel: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self._check(self._cuda.cuModuleGetFunction(ctypes.byref(function), self._module, kernel.encode()))
        self._kernels[kernel] = function
        self._shared_bytes[kernel] = DEFAULT_SHARED_BYTES
        return function

    def _check(self, result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(result, ctypes.byref(text))
            raise DeviceError(f"The CUDA driver failed: {(text.value or b'unknown error').decode()} ({result}).")


def can_overlap(device: torch.device) -> bool:
    """Whether kernels on `device` can begin before the one before has ended, in a graph too. Raises DeviceError."""
    driver = ctypes.c_int()
    if _library().cuDriverGetVersion(ctypes.byref(driver)):
        raise DeviceError("The CUDA driver does not tell its version.")
    return knows_overlap(architecture(device), driver.value)


def knows_overlap(arch: int, driver: int) -> bool:
    """`arch` is 90 for compute capability 9.0, `driver` 12030 for CUDA 12.3."""
    return arch >= OVERLAPPING_ARCH and driver >= OVERLAPPING_DRIVER


class Arguments:
    """Kernel arguments as cuLaunchKernel reads them: the addresses of values, which live as long as this does.

    A prompt's step launches hundreds of kernels, and the host is soon slower than the device: arrays take a third of
    the time that an object of ctypes for each value does.
    """

    __slots__ = ("_addresses", "_as_parameter_", "_values")

    def __init__(self, arguments: tuple[Argument, ...]) -> None:
        self._values = array("Q", map(_word, arguments))
        begin, size = self._values.buffer_info()[0], self._values.itemsize
        self._addresses = array("Q", range(begin, begin + size * len(arguments), size))
        self._as_parameter_ = ctypes.c_void_p(self._addresses.buffer_info()[0])


def _word(argument: Argument) -> int:
    """Eight bytes of which a kernel reads as many as its parameter has."""
    kind = type(argument)
    if kind is torch.Tensor:
        assert argument.is_contiguous()  # type: ignore[union-attr]
        return argument.data_ptr()  # type: ignore[union-attr]
    if argument is None:
        return 0
    if kind is int:
        return argument & 0xFFFFFFFF  # type: ignore[operator, return-value]
    assert kind is float, kind
    (word,) = _UINT32.unpack(_FLOAT32.pack(argument))
    return int(word)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(f"The NVIDIA driver (libcuda.so.1) cannot be loaded: {error}.") from error
    pointer = ctypes.c_void_p
    library.cuFuncSetAttribute.argtypes = (pointer, ctypes.c_int, ctypes.c_int)
    library.cuModuleGetFunction.argtypes = (pointer, pointer, ctypes.c_char_p)
    library.cuModuleLoadData.argtypes = (pointer, ctypes.c_char_p)
    return library


@lru_cache(maxsize=1)
def _launch_kernel() -> Callable[[bytes, ctypes.c_void_p, "Arguments", None], int]:
    """cuLaunchKernelEx. Called with Python's lock held: other threads would take it at each of a step's launches, for
    up to 5 ms, and a launch only queues."""
    function = ctypes.PyDLL("libcuda.so.1").cuLaunchKernelEx
    function.argtypes = (ctypes.c_char_p, *(ctypes.c_void_p,) * 3)
    return function
