"""The same few operations, once per device; `reference.py` is what they mean."""

from typing import Literal

import torch

from starling.errors import DeviceError
from starling.model.ops.interface import FusedLayers, Ops, Packed

__all__ = ["FusedLayers", "Ops", "Packed", "choose_ops"]


def choose_ops(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    cpu_precision: Literal["auto", "int8", "int16", "float32"] = "auto",
    kv_dtype: Literal["float16", "float32"] = "float16",
) -> Ops:
    """The best implementation that this machine can run. Raises DeviceError when `device` is not to be had."""
    from starling.model.ops.cpu import cpu_ops

    if device == "cuda":
        raise DeviceError("STARLING_DEVICE is cuda, and no CUDA operations are implemented yet. Use cpu.")
    return cpu_ops(threads, cpu_precision, torch.float16 if kv_dtype == "float16" else torch.float32)
