"""The operations in plain torch, for machines without a C++ compiler: several times slower, no setup."""

import logging

import torch
import torch.nn.functional as F

from starling.model.awq import AwqWeight, unpack
from starling.model.ops.cpu.compiler import NoCompilerError
from starling.model.ops.cpu.cores import usable_cores
from starling.model.ops.cpu.ops import MAX_PREFILL_TOKENS, CpuOps, Precision
from starling.model.ops.interface import Ops, Packed
from starling.model.ops.reference import ReferenceOps

log = logging.getLogger(__name__)

ROWS = 64  # torch's kernel takes 16 output features at a time, and its fast path 64
PACKED_ROWS = 4096  # output features repacked at a time: unpacked to int32 they take 16 KB per input feature


class TorchCpuOps(ReferenceOps):
    """Weights stay at 4 bits, read by torch's own int4 matmul. It takes bfloat16: errors of about 3e-3 per layer.

    `kv_dtype` as in CpuOps. The output projection stays in fp16 and is widened to float32 a slice at a time.
    """

    name = "torch-cpu"
    layout: str | None = "torch-cpu-1"

    def __init__(self, kv_dtype: torch.dtype = torch.float16) -> None:
        super().__init__("cpu", torch.float32)
        self.kv_dtype = kv_dtype
        # A 7B model on two threads then reads prompts at 94% of the speed of steps of 256 tokens.
        self.prefill_tokens = min(32 * torch.get_num_threads(), MAX_PREFILL_TOKENS)

    def pack_awq(self, weight: AwqWeight, paired: bool = False) -> Packed:
        """`weight` as torch packs it; `scales_and_zeros` bfloat16 [groups, out, 2]; `shape`: out, group size.

        torch's value is (q - 8) * scale + zero; so zero = (8 - z) * scale.
        """
        outputs = weight.out_features
        padding = -outputs % ROWS
        scales = F.pad(weight.scales.to(torch.float32), (0, padding))
        zeros = F.pad(unpack(weight.qzeros), (0, padding), value=8)
        slices = []
        for first in range(0, outputs, PACKED_ROWS):
            words = weight.qweight[:, first // 8 : (first + PACKED_ROWS) // 8]
            values = unpack(words).t()  # [rows, in]
            values = F.pad(values, (0, 0, 0, -values.shape[0] % ROWS)).to(torch.int32).contiguous()
            slices.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1))
        return {
            "weight": torch.cat(slices),
            "scales_and_zeros": torch.stack([scales, (8 - zeros) * scales], dim=-1).to(torch.bfloat16),
            "shape": torch.tensor([outputs, weight.group_size]),
        }

    def pack_head(self, weight: torch.Tensor) -> Packed:
        return {"weight": weight}

    def awq_linear(self, x: torch.Tensor, weight: Packed, prompt_tokens: torch.Tensor) -> torch.Tensor:
        outputs, group = weight["shape"].tolist()
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.to(torch.bfloat16), weight["weight"], group, weight["scales_and_zeros"]
        )
        return y[:, :outputs].to(torch.float32)

    def head(self, x: torch.Tensor, weight: Packed) -> torch.Tensor:
        slices = torch.split(weight["weight"], PACKED_ROWS)
        return torch.cat([F.linear(x, part.to(torch.float32)) for part in slices], dim=1)


def cpu_ops(threads: int | None = None, precision: Precision = "auto", kv_dtype: torch.dtype = torch.float16) -> Ops:
    """The CPU's operations: the kernels, or plain torch with a warning where they cannot be built.

    `threads`: None for the cores that this process may use. torch uses as many from now on: by itself it ignores a
    container's quota, and its threads spin for milliseconds after each operation.
    """
    threads = threads or usable_cores()
    torch.set_num_threads(threads)
    try:
        return CpuOps(threads, precision, kv_dtype)
    except NoCompilerError as error:
        log.warning("Running plain torch operations on the CPU, several times slower than the kernels. %s", error)
        return TorchCpuOps(kv_dtype)
