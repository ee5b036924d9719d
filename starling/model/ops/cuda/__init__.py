"""The operations on an NVIDIA GPU: CUDA C++ kernels, compiled by NVRTC at first use or when an image is built."""

from starling.model.ops.cuda.ops import CudaOps

__all__ = ["CudaOps"]
