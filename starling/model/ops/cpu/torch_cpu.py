"""The operations in plain torch, for a CPU whose machine has no C++ compiler: several times slower, no setup."""

import logging

import torch

from starling.model.ops.cpu.compiler import NoCompilerError
from starling.model.ops.cpu.ops import CpuOps, Precision
from starling.model.ops.interface import Ops
from starling.model.ops.reference import ReferenceOps

log = logging.getLogger(__name__)


class TorchCpuOps(ReferenceOps):
    name = "torch-cpu"


def cpu_ops(threads: int | None = None, precision: Precision = "auto", kv_dtype: torch.dtype = torch.float16) -> Ops:
    """The CPU's operations: the kernels, or plain torch with a warning where they cannot be built."""
    try:
        return CpuOps(threads, precision, kv_dtype)
    except NoCompilerError as error:
        log.warning("The CPU runs plain torch operations, several times slower. %s", error)
        return TorchCpuOps()
