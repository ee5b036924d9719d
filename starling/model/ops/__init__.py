"""The same few operations, implemented once per device; `reference.py` defines what they mean."""

import logging
from typing import Literal

import torch

from starling.errors import DeviceError
from starling.model.ops.interface import FusedLayers, Ops, Packed

log = logging.getLogger(__name__)

__all__ = ["FusedLayers", "Ops", "Packed", "choose_ops"]


def choose_ops(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    cpu_precision: Literal["auto", "int8", "int16", "float32"] = "auto",
    kv_dtype: Literal["float16", "float32"] = "float16",
) -> Ops:
    """The operations for `device`; "auto" picks the best that this machine can run. Raises DeviceError."""
    from starling.model.ops.cpu import cpu_ops

    if device == "cuda" or (device == "auto" and torch.version.cuda is not None):
        from starling.model.ops.cuda import CudaOps

        try:
            return CudaOps.on_gpu()
        except DeviceError as error:
            if device == "cuda":
                raise
            log.warning("Running on the CPU, many times slower than a GPU. %s", error)
    return cpu_ops(threads, cpu_precision, torch.float16 if kv_dtype == "float16" else torch.float32)
