"""The few operations that a device must offer. `reference.py` defines each one in plain torch."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from starling.model.awq import AwqWeight
from starling.model.batch import Batch

# A weight in the layout that a device's kernels read: named tensors, so that it can be cached and mapped back.
Packed = Mapping[str, torch.Tensor]


class DecoderLayer(Protocol):
    """One decoder layer's weights. Projections of the same input are fused: q|k|v and gate|up."""

    @property
    def input_norm(self) -> torch.Tensor: ...  # fp16 [H]
    @property
    def qkv(self) -> Packed: ...
    @property
    def out(self) -> Packed: ...
    @property
    def post_attention_norm(self) -> torch.Tensor: ...  # fp16 [H]
    @property
    def gate_up(self) -> Packed: ...
    @property
    def down(self) -> Packed: ...


@runtime_checkable
class FusedLayers(Protocol):
    """What a device may offer besides Ops: all layers in one call, equal to the single calls but for rounding."""

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
        """Embeddings [T, H] → the residual stream after the last layer, for the batch's `logit_rows`: [rows, H].

        For the other tokens the last layer only writes keys and values.

        `keys` and `values` hold all layers: [layers, blocks, kv_heads, block_size, D]. `x` may be overwritten.
        """
        ...


class Ops(Protocol):
    """One device's operations. Results do not depend on which other requests share the batch.

    Shapes use T for the step's tokens, H for hidden_size, V for vocab_size, D for head_dim.
    `kv_dtype` is what the KV cache stores; activations are `dtype`.
    """

    name: str  # what does the computing, for people to read
    layout: str | None  # names the packed layout and its version, for the cache of repacked weights; None: not cached
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    prefill_tokens: int  # prompt tokens per step: enough to keep it busy, no more, since other requests wait

    def pack_awq(self, weight: AwqWeight, paired: bool = False) -> Packed:
        """Repack one linear layer, once, at load time; `weight`'s tensors are on `device` or on the CPU.

        `paired`: the outputs are gate | up, inputs of silu_and_mul, so each pair may be stored side by side.
        """
        ...

    def pack_head(self, weight: torch.Tensor) -> Packed:
        """Repack the fp16 matrix [V, H] of the output projection."""
        ...

    def restore(self, weight: Packed) -> Packed:
        """What pack_awq or pack_head returned, rebuilt from its tensors, which a cache returns on the CPU."""
        ...

    def awq_linear(self, x: torch.Tensor, weight: Packed, prompt_tokens: torch.Tensor) -> torch.Tensor:
        """[T, in] → [T, out]. Rows marked in `prompt_tokens` (bool [T]) may be computed at lower precision."""
        ...

    def head(self, x: torch.Tensor, weight: Packed) -> torch.Tensor:
        """[rows, H] → float32 logits [rows, V]."""
        ...

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, sampled: torch.Tensor | None = None) -> torch.Tensor:
        """int64 [T], fp16 [V, H] → [T, H]. An id below 0, -(1 + row), stands for `sampled[row]`, int [any]."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[T, H] → x / sqrt(mean(x²) + eps) * weight."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual). Either input may be overwritten."""
        ...

    def rotate_and_cache(
        self, qkv: torch.Tensor, batch: Batch, rotary: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Split [T, q + k + v], rotate q and k, write k and v to their slots; returns q as [T, heads, D].

        `rotary` is float32 [max_positions, D]: cosines then sines of each of the D/2 frequencies; element i pairs
        with i + D/2 (the half-split form of Hugging Face). `keys` and `values` are one layer's
        [blocks, kv_heads, block_size, D].
        """
        ...

    def attention(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int | None
    ) -> torch.Tensor:
        """Causal attention of [T, heads, D] over the paged cache → [T, heads * D].

        A token at position p sees positions max(0, p - window + 1) to p; scores are scaled by 1 / sqrt(D); query
        head h reads key/value head h // (heads / kv_heads).
        """
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 * I] → silu(first half) * second half, [T, I]."""
        ...

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """float32 logits [rows, V] → token ids, int64 [rows]; the other arguments are [rows], on the CPU.

        Temperature 0 takes the largest logit, the lowest id on a tie. Otherwise p = softmax(logits /
        temperature), and filters cut p down, in this order: min_p keeps tokens of at least min_p times the largest p;
        top_k keeps the k likeliest (0: all); top_p keeps, of what is left and renormalised, the likeliest until their
        sum reaches top_p, at least one. Equal p rank by id. The token is the first, in order of id, at which the
        cumulative kept p exceeds `uniform` (float64, in [0, 1)) times its total.
        """
        ...
