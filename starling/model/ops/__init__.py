"""The same few operations, once per device; `reference.py` is what they mean."""

from starling.model.ops.interface import Ops, Packed

__all__ = ["Ops", "Packed"]
