"""torch's own CUDA operations on the emulated GPU: copied to the host, computed there, and copied back.

Python imports this first in every process whose PYTHONPATH holds this folder. Allocations, views and copies between the
devices stay torch's own. In a capture, an operation of torch's is an error: the step's graph should hold none.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

# What needs no kernel as long as memory is contiguous, by name without overload.
KEPT = {
    "_local_scalar_dense", "_pin_memory", "_reshape_alias", "alias", "as_strided", "detach", "empty", "empty_strided",
    "is_pinned", "is_set_to", "record_stream", "resize_", "set_", "unfold", "view",
    "view_as_complex", "view_as_real",
}  # fmt: skip
COPY = "aten::copy_"  # has no CUDA kernel, but launches some
NO_KERNELS = os.environ.get("EMULATED_GPU_NO_KERNELS") == "1"  # operations only allocate what they return
HOST = "meta" if NO_KERNELS else "cpu"
# Where torch's own copy_ is found, which serves every device: not in the slot that is replaced here.
COMPOSITE = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]


def install() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each that replaces another
        for name in torch._C._dispatch_get_all_op_names():
            stem, _, overload = name.removeprefix("aten::").partition(".")
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") or name == COPY
            packet = getattr(torch.ops.aten, stem, None) if name.startswith("aten::") and has_kernel else None
            if packet is not None and stem not in KEPT and (overload or "default") in packet.overloads():
                run = computed_on_host(getattr(packet, overload or "default"))
                library.impl(name.removeprefix("aten::"), run, "CUDA", allow_override=True)  # type: ignore[no-untyped-call]


def computed_on_host(operation: torch._ops.OpOverload) -> Callable[..., Any]:
    name, arguments = operation.name(), operation._schema.arguments  # type: ignore[no-untyped-call]
    names = [argument.name for argument in arguments]
    written = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]

    def run(*given: Any, **named: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{name} is called while a graph is captured: not one of our kernels")
        if name == COPY and is_plain(*given[:2]):
            return operation.redispatch(COMPOSITE, *given, **named)
        host_given, host_named = to_host(list(given)), to_host(named)
        # By the packet: it takes numbers where this overload was called with them as tensors.
        result = operation.overloadpacket(*host_given, **host_named)
        targets = dict(zip(names, given, strict=False)) | named
        values = dict(zip(names, host_given, strict=False)) | host_named
        replaced: dict[int, torch.Tensor] = {}
        for each in written:
            target, value = targets.get(each), values.get(each)
            if isinstance(target, torch.Tensor) and target.device.type == "cuda":
                if target.shape != value.shape:
                    target.resize_(value.shape)
                write(target, value)
                replaced[id(value)] = target
        return to_device(result, replaced)

    return run


def is_plain(to: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether a copy needs no kernel: between the host and the device torch makes what it copies contiguous first."""
    alike = to.dtype == source.dtype and to.shape == source.shape and to.is_contiguous() and source.is_contiguous()
    return alike or to.device != source.device


def to_host(x: Any) -> Any:
    if isinstance(x, torch.Tensor) and x.device.type == "cuda":
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if NO_KERNELS else read(x)
    if isinstance(x, torch.device):
        return torch.device(HOST)
    if isinstance(x, dict):
        return {key: to_host(value) for key, value in x.items()}
    return type(x)(map(to_host, x)) if isinstance(x, (list, tuple)) else x


def to_device(x: Any, replaced: dict[int, torch.Tensor]) -> Any:
    if isinstance(x, torch.Tensor):
        if id(x) in replaced:
            return replaced[id(x)]
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        write(made, x)
        return made
    return type(x)(to_device(part, replaced) for part in x) if isinstance(x, (list, tuple)) else x


def span(x: torch.Tensor) -> torch.Tensor:
    """The elements from x's first to its last, whatever lies between them."""
    size = 1 + sum((count - 1) * stride for count, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((size if x.numel() else 0,), (1,))


def read(x: torch.Tensor) -> torch.Tensor:
    around = span(x)
    return torch.empty(around.shape, dtype=x.dtype).copy_(around).as_strided(x.shape, x.stride(), 0)


def write(x: torch.Tensor, values: torch.Tensor) -> None:
    if x.numel() and not NO_KERNELS:
        around = span(x)
        host = torch.empty(around.shape, dtype=x.dtype).copy_(around)
        host.as_strided(x.shape, x.stride(), 0).copy_(values)
        around.copy_(host)


install()
