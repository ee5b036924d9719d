"""CudaOps: the operations of `interface.py`, implemented by the CUDA kernels in native/."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from starling.model.awq import AwqWeight
from starling.model.batch import Batch
from starling.model.ops.cuda import nvrtc
from starling.model.ops.cuda.attention import AttentionKernels
from starling.model.ops.cuda.device import architecture, usable_gpu
from starling.model.ops.cuda.driver import DriverModule
from starling.model.ops.cuda.elementwise import ElementwiseKernels
from starling.model.ops.cuda.linear import LinearKernels, PackedLinear, pack, pack_head
from starling.model.ops.cuda.module import Module
from starling.model.ops.cuda.sampling import SETTINGS, SamplingKernels, settings_of
from starling.model.ops.interface import DecoderLayer, Packed


class CudaOps:
    """The operations on one GPU. Activations are fp16, the residual stream and logits float32, the KV cache fp16.

    Results do not depend on the batch, bit for bit. `load` returns a .cu file's kernels. `attention_ranges`: see
    AttentionKernels; None: what suits the GPU.
    """

    name = "cuda"
    layout: str | None = None  # packing on the GPU takes less time than reading a cache would
    prefill_tokens = 512

    def __init__(
        self, device: torch.device, load: Callable[[str], Module], attention_ranges: int | None = None
    ) -> None:
        self.device = device
        self.dtype = torch.float16
        self.kv_dtype = torch.float16
        self._load = load
        self._attention_ranges = attention_ranges
        self._linear = LinearKernels(load, device)
        self._elementwise = ElementwiseKernels(load)
        self._attention: dict[tuple[int, int, int, int], AttentionKernels] = {}

    @classmethod
    def on_gpu(cls, overlap: bool = True) -> "CudaOps":
        """`overlap`: see DriverModule. Raises DeviceError where there is no usable GPU."""
        device = usable_gpu()
        compiling = nvrtc.compiling(architecture(device))  # what is not cached, while the weights are read

        def load(source: str) -> Module:
            compiling[source].result()
            return DriverModule.on_gpu(source, device, overlap)

        return cls(device, cache(load))

    def sampling(self, rows: int, vocabulary: int, sequences: int) -> SamplingKernels:
        """The kernels that turn logits into ids on the device."""
        return SamplingKernels(self._load, self.device, rows, vocabulary, sequences)

    def pack_awq(self, weight: AwqWeight, paired: bool = False) -> Packed:
        return PackedLinear(pack(weight, paired), self.device)

    def pack_head(self, weight: torch.Tensor) -> Packed:
        return PackedLinear(pack_head(weight), self.device)

    def restore(self, weight: Packed) -> Packed:
        return _packed(weight)

    def awq_linear(self, x: torch.Tensor, weight: Packed, prompt_tokens: torch.Tensor) -> torch.Tensor:
        return self._linear.linear(x.to(torch.float16), _packed(weight))

    def head(self, x: torch.Tensor, weight: Packed) -> torch.Tensor:
        return self._linear.head(x.to(torch.float16), _packed(weight))

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, sampled: torch.Tensor | None = None) -> torch.Tensor:
        known = None if sampled is None else sampled.to(torch.int32)
        return self._elementwise.embed(token_ids.to(torch.int32), known, table)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._linear.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._linear.add_rms_norm(x.to(torch.float16), residual, weight, eps), residual

    def rotate_and_cache(
        self, qkv: torch.Tensor, batch: Batch, rotary: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        _, kv_heads, _, dim = keys.shape
        kernels = self._attention_for(qkv.shape[1] // dim - 2 * kv_heads, keys, len(rotary))
        return kernels.rotate_and_cache(qkv.to(torch.float16), batch, rotary, keys, values)

    def attention(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int | None
    ) -> torch.Tensor:
        kernels = self._attention_for(q.shape[1], keys, batch.block_tables.shape[1] * keys.shape[2])
        return kernels.attention(q, keys, values, batch, kernels.plan(batch, window))

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._elementwise.silu_and_mul(gate_up.to(torch.float16))

    def run_layers(
        self,
        x: torch.Tensor,
        layers: Sequence[DecoderLayer],
        batch: Batch,
        keys: torch.Tensor,
        values: torch.Tensor,
        rotary: torch.Tensor,
        window: int | None,
        eps: float,
    ) -> torch.Tensor:
        linear, residual = self._linear, x
        kv_heads, dim = keys.shape[2], keys.shape[4]
        attention = self._attention_for(_packed(layers[0].qkv).rows // dim - 2 * kv_heads, keys[0], len(rotary))
        plan = attention.plan(batch, window)
        for layer, own_keys, own_values in zip(layers, keys, values, strict=True):
            qkv = linear.norm_linear(residual, layer.input_norm, eps, _packed(layer.qkv))
            attended = attention.attend(qkv, batch, plan, rotary, own_keys, own_values)
            if layer is layers[-1] and not batch.wants_all:
                attended, residual = self._elementwise.pick(batch.logit_rows.to(torch.int32), attended, residual)
            linear.add_linear(attended, _packed(layer.out), residual)
            active = linear.norm_linear_silu_mul(residual, layer.post_attention_norm, eps, _packed(layer.gate_up))
            linear.add_linear(active, _packed(layer.down), residual)
        return residual

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        rows, vocabulary = logits.shape
        if not rows:  # a prompt chunk that is not the last
            return torch.empty(0, dtype=torch.int64, device=self.device)
        kernels = SamplingKernels(self._load, self.device, rows, vocabulary, 1)
        settings = settings_of(*(s.numpy() for s in (temperature, top_k, top_p, min_p, uniform)))
        packed = torch.from_numpy(settings.view(np.uint8).reshape(rows, SETTINGS.itemsize)).to(self.device)
        return kernels.sample(logits, packed).to(torch.int64)

    def _attention_for(self, heads: int, keys: torch.Tensor, max_positions: int) -> AttentionKernels:
        shape = (heads, keys.shape[1], keys.shape[3], max_positions)
        if shape not in self._attention:
            self._attention[shape] = AttentionKernels(self._load, self.device, *shape, self._attention_ranges)
        return self._attention[shape]


def _packed(weight: Packed) -> PackedLinear:
    assert isinstance(weight, PackedLinear)
    return weight
