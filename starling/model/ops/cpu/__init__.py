"""The operations on a CPU: C++ kernels, compiled at first use, or plain torch where there is no compiler."""

from starling.model.ops.cpu.ops import CpuOps
from starling.model.ops.cpu.torch_cpu import TorchCpuOps, cpu_ops

__all__ = ["CpuOps", "TorchCpuOps", "cpu_ops"]
