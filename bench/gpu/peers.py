"""Other libraries' products with 4-bit weights, each packed from the same AWQ weight; and dense fp16 ones.

A library is imported only when it is measured. Where it is missing, a line says so instead of its table; where a newer
version expects another layout, the table's cells do.
"""

import importlib.metadata
from collections.abc import Callable

import torch

from bench.gpu.products import Contender, Multiply
from starling.model.awq import AwqWeight, unpack


def dense() -> Contender:
    """cuBLAS over the whole matrix in fp16: four times the bytes, and nothing to dequantize."""

    def multiply(matrix: torch.Tensor) -> Multiply:
        return lambda x: torch.nn.functional.linear(x, matrix)

    return Contender("cuBLAS fp16", lambda weight: multiply(weight.dequantize(torch.float16)), multiply)


def torch_int4() -> Contender:
    """tinygemm, which comes with torch, in bf16: w = (q - 8) * scale + zero."""

    def make(weight: AwqWeight) -> Multiply:
        values = unpack(weight.qweight).T.to(torch.uint8)  # [N, K]
        words = torch.ops.aten._convert_weight_to_int4pack((values[:, ::2] << 4 | values[:, 1::2]).contiguous(), 8)
        zeros = (8 - unpack(weight.qzeros)).float() * weight.scales.float()
        scales = torch.stack([weight.scales.bfloat16(), zeros.bfloat16()], dim=-1).contiguous()  # [K / group, N, 2]
        group = weight.group_size

        def multiply(x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, words, group, scales)
            return found

        return multiply

    return Contender(f"torch {torch.__version__} int4 (bf16)", make, dtype=torch.bfloat16)


def gemlite() -> Contender:
    from gemlite import DType, GemLiteLinear

    def make(weight: AwqWeight) -> Multiply:
        n, k, group = weight.out_features, weight.in_features, weight.group_size
        layer = GemLiteLinear(
            4, group_size=group, in_features=k, out_features=n, input_dtype=DType.FP16, output_dtype=DType.FP16
        )
        values = unpack(weight.qweight).T.to(torch.uint8).contiguous()  # [N, K]
        scales = weight.scales.T.contiguous().view(-1, 1)  # [N * K / group, 1], as HQQ keeps them
        zeros = unpack(weight.qzeros).T.to(torch.float16).contiguous().view(-1, 1)
        layer.pack(values, scales, zeros, None)
        return called(layer)

    return Contender(f"gemlite {importlib.metadata.version('gemlite')}", make)


def humming() -> Contender:
    from humming.layer import HummingLayer

    def make(weight: AwqWeight) -> Multiply:
        layer = HummingLayer(
            shape_n=weight.out_features,
            shape_k=weight.in_features,
            weight_config={"quant_method": "awq", "bits": 4, "group_size": weight.group_size, "zero_point": True},
            torch_dtype=torch.float16,
        ).to(weight.scales.device)
        layer.load_from_tensors({"qweight": weight.qweight, "qzeros": weight.qzeros, "scales": weight.scales})
        layer.transform()
        return called(layer)

    return Contender(f"humming {importlib.metadata.version('humming-kernels')}", make)


def marlin() -> Contender:
    from gptqmodel.nn_modules.qlinear.marlin_awq import AwqMarlinLinear

    def make(weight: AwqWeight) -> Multiply:
        layer = AwqMarlinLinear(
            bits=4,
            group_size=weight.group_size,
            desc_act=False,
            sym=True,
            in_features=weight.in_features,
            out_features=weight.out_features,
            register_buffers=True,
        ).to(weight.scales.device)
        layer.load_state_dict({"qweight": weight.qweight, "qzeros": weight.qzeros, "scales": weight.scales})
        layer.post_init()
        layer.eval()
        return called(layer)

    return Contender(f"gptqmodel {importlib.metadata.version('gptqmodel')} Marlin", make)


def called(layer: Callable[[torch.Tensor], object]) -> Multiply:
    """Give a module from untyped code its type."""

    def multiply(x: torch.Tensor) -> torch.Tensor:
        found = layer(x)
        assert isinstance(found, torch.Tensor)
        return found

    return multiply


PEERS: dict[str, Callable[[], Contender]] = {
    "cublas": dense,
    "torch-int4": torch_int4,
    "humming": humming,
    "gemlite": gemlite,
    "marlin": marlin,
}
