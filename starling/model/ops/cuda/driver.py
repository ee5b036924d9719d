"""The CUDA driver: machine code → kernels that can be launched on torch's stream."""

import ctypes
from functools import lru_cache

import torch

from starling.errors import DeviceError
from starling.model.ops.cuda import nvrtc
from starling.model.ops.cuda.module import Argument, Grid

MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DEFAULT_SHARED_BYTES = 48 << 10  # what a kernel may use without being asked about it


class DriverModule:
    """native/`source`.cu on one GPU. Raises DeviceError."""

    def __init__(self, source: str, device: torch.device) -> None:
        self._cuda = _library()
        self._device = device
        major, minor = torch.cuda.get_device_capability(device)
        torch.cuda.current_stream(device)  # makes torch create the context that the module is loaded into
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            self._module = ctypes.c_void_p()
            self._check(
                self._cuda.cuModuleLoadData(ctypes.byref(self._module), nvrtc.cubin(source, major * 10 + minor))
            )
        self._kernels: dict[str, ctypes.c_void_p] = {}
        self._shared_bytes: dict[str, int] = {}

    def launch(self, kernel: str, grid: Grid, threads: int, shared_bytes: int, *arguments: Argument) -> None:
        function = self._kernels.get(kernel) or self._find(kernel)
        if shared_bytes > self._shared_bytes[kernel]:
            self._check(self._cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_BYTES, shared_bytes))
            self._shared_bytes[kernel] = shared_bytes
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        self._check(
            self._cuda.cuLaunchKernel(function, *grid, threads, 1, 1, shared_bytes, stream, packed(arguments), None)
        )

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


def packed(arguments: tuple[Argument, ...]) -> "ctypes.Array[ctypes.c_void_p]":
    """Kernel arguments as cuLaunchKernel reads them: addresses of values, which live as long as the array does."""
    values = [_value(argument) for argument in arguments]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    addresses.values = values  # type: ignore[attr-defined]
    return addresses


def _value(argument: Argument) -> "ctypes.c_void_p | ctypes.c_int32 | ctypes.c_float":
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_int32(argument) if isinstance(argument, int) else ctypes.c_float(argument)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceError(f"The NVIDIA driver (libcuda.so.1) cannot be loaded: {error}.") from error
    pointer, unsigned = ctypes.c_void_p, ctypes.c_uint
    library.cuLaunchKernel.argtypes = (pointer, *(unsigned,) * 7, pointer, pointer, pointer)
    library.cuFuncSetAttribute.argtypes = (pointer, ctypes.c_int, ctypes.c_int)
    library.cuModuleGetFunction.argtypes = (pointer, pointer, ctypes.c_char_p)
    library.cuModuleLoadData.argtypes = (pointer, ctypes.c_char_p)
    return library
