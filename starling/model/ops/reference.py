"""The operations in plain torch: what each one means. The oracle for every kernel, and slow on purpose."""

import math

import torch
import torch.nn.functional as F

from starling.model.awq import AwqWeight
from starling.model.batch import Batch
from starling.model.ops.interface import Packed


class ReferenceOps:
    """Plain torch on any device. Weights are dequantized once, to `dtype`."""

    name = "reference"
    layout: str | None = None
    prefill_tokens = 256

    def __init__(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.kv_dtype = dtype

    def pack_awq(self, weight: AwqWeight, paired: bool = False) -> Packed:
        return {"weight": weight.dequantize(self.dtype).to(self.device)}

    def pack_head(self, weight: torch.Tensor) -> Packed:
        return {"weight": weight.to(self.device, self.dtype)}

    def restore(self, weight: Packed) -> Packed:
        return {part: tensor.to(self.device) for part, tensor in weight.items()}

    def awq_linear(self, x: torch.Tensor, weight: Packed, prompt_tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight["weight"])

    def head(self, x: torch.Tensor, weight: Packed) -> torch.Tensor:
        return F.linear(x, weight["weight"]).to(torch.float32)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, sampled: torch.Tensor | None = None) -> torch.Tensor:
        return table[resolve_sampled_ids(token_ids, sampled)].to(self.dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        # Normalise in float32, cast, then multiply: the order of Hugging Face's MistralRMSNorm.
        x32 = x.to(torch.float32)
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
        return weight.to(self.dtype) * normed.to(self.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def rotate_and_cache(
        self, qkv: torch.Tensor, batch: Batch, rotary: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        _, kv_heads, block_size, dim = keys.shape
        kv_size = kv_heads * dim
        q, k, v = torch.split(qkv, [qkv.shape[1] - 2 * kv_size, kv_size, kv_size], dim=1)
        q, k, v = q.reshape(len(q), -1, dim), k.reshape(len(k), -1, dim), v.reshape(len(v), -1, dim)
        cos, sin = rotary[batch.positions.long()].unsqueeze(1).chunk(2, dim=-1)  # each [T, 1, D / 2]
        blocks, offsets = batch.slots.long() // block_size, batch.slots.long() % block_size
        keys[blocks, :, offsets] = _rotate(k, cos, sin).to(keys.dtype)
        values[blocks, :, offsets] = v.to(values.dtype)
        return _rotate(q, cos, sin)

    def attention(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int | None
    ) -> torch.Tensor:
        heads, dim = q.shape[1:]
        kv_heads, block_size = keys.shape[1:3]
        out = torch.empty_like(q)
        starts = batch.query_starts.tolist()
        for request, context in enumerate(batch.context_lens.tolist()):
            start, end = starts[request], starts[request + 1]
            first = context - (end - start)  # position of this request's first query
            first_seen = 0 if window is None else max(0, first - window + 1)
            table = batch.block_tables[request, first_seen // block_size : -(-context // block_size)].long()
            base = first_seen // block_size * block_size
            # [blocks, kv_heads, block_size, D] → [kv_heads, positions, D]
            k = keys[table].transpose(0, 1).flatten(1, 2)[:, first_seen - base : context - base]
            v = values[table].transpose(0, 1).flatten(1, 2)[:, first_seen - base : context - base]
            k = k.to(q.dtype).repeat_interleave(heads // kv_heads, dim=0)
            v = v.to(q.dtype).repeat_interleave(heads // kv_heads, dim=0)
            scores = q[start:end].transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(dim)  # [heads, queries, positions]
            query_at = torch.arange(first, context, device=q.device).unsqueeze(1)
            key_at = torch.arange(first_seen, context, device=q.device)
            visible = key_at <= query_at
            if window is not None:
                visible &= key_at > query_at - window
            scores = scores.masked_fill(~visible, -math.inf)
            weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
            out[start:end] = (weights @ v).transpose(0, 1)
        return out.flatten(1)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        settings = zip(*(t.tolist() for t in (temperature, top_k, top_p, min_p, uniform)), strict=True)
        rows = [_sample_row(row, *of_row) for row, of_row in zip(logits, settings, strict=True)]
        return torch.stack(rows) if rows else torch.empty(0, dtype=torch.int64)


def _sample_row(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> torch.Tensor:
    if temperature == 0:
        return (logits == logits.max()).to(torch.uint8).argmax()
    p = ((logits.to(torch.float64) - logits.max()) / temperature).softmax(dim=-1)
    kept = p >= min_p * p.max()
    order = logits.argsort(descending=True, stable=True)  # by logit, not p: different logits may round to the same p
    if top_k > 0:
        kept[order[top_k:]] = False
    p = p * kept
    ranked = p[order] / p.sum()
    # A token stays while the likelier ones have not reached top_p; the likeliest always stays.
    past = ranked.cumsum(0) - ranked >= (top_p if top_p < 1 else math.inf)  # a sum may round to 1 before its end
    past[0] = False
    p[order[past]] = 0
    mass = p.cumsum(0)
    return (mass > uniform * mass[-1]).to(torch.uint8).argmax()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, heads, D], rotated by the angles of each token's position; `cos` and `sin` are [T, 1, D / 2]."""
    first, second = x.to(torch.float32).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def resolve_sampled_ids(token_ids: torch.Tensor, sampled: torch.Tensor | None) -> torch.Tensor:
    """The ids, with those below 0 replaced by the sampled ids that they stand for (see Ops.embed)."""
    if sampled is None or not (below := token_ids < 0).any():
        return token_ids
    token_ids = token_ids.clone()
    token_ids[below] = sampled[-1 - token_ids[below]].to(token_ids.dtype)
    return token_ids
