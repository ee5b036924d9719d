"""The same few operations, once per device; `reference.py` is what they mean."""

from typing import Literal

from starling.model.ops.interface import Ops, Packed

__all__ = ["Ops", "Packed", "choose_ops"]


def choose_ops(device: Literal["auto", "cpu", "cuda"]) -> Ops:
    """The best implementation that this machine can run."""
    from starling.model.ops.cpu import cpu_ops

    return cpu_ops()
