"""The Mistral (and Llama) decoder: a batch of tokens and a KV cache in, logits out, written in terms of ops."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from starling.model import packed_cache
from starling.model.awq import concatenate
from starling.model.batch import Batch
from starling.model.checkpoint import Checkpoint, open_checkpoint
from starling.model.config import ModelConfig
from starling.model.kv_cache import KVCache
from starling.model.memory import check_fits, free_bytes
from starling.model.ops import FusedLayers, Ops, Packed
from starling.model.reading import read_tensor
from starling.model.staging import Staging

LINEARS = {  # of a layer, from the smallest
    "out": ("self_attn.o_proj",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "down": ("mlp.down_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights, packed for the device. Projections that share an input are fused: q|k|v, gate|up."""

    input_norm: torch.Tensor  # [H]
    qkv: Packed
    out: Packed
    post_attention_norm: torch.Tensor  # [H]
    gate_up: Packed
    down: Packed


@dataclass(frozen=True)
class Mistral:
    config: ModelConfig
    ops: Ops
    embedding: torch.Tensor  # fp16 [V, H]
    layers: tuple[Layer, ...]
    norm: torch.Tensor  # [H]
    head: Packed
    rotary: torch.Tensor  # float32 [max_positions, D]

    @classmethod
    def load(cls, folder: Path, ops: Ops, cache_folders: Sequence[Path] | None = None) -> "Mistral":
        """Read and repack the checkpoint in `folder`, or map what an earlier start repacked. Raises CheckpointError.

        `cache_folders`: where repacked weights may be kept, best first; None for packed_cache's choice.
        """
        config = ModelConfig.from_folder(folder)
        read = read_tensor
        if ops.device.type == "cuda":
            positions = min(config.sliding_window or config.max_position_embeddings, config.max_position_embeddings)
            least = KVCache.bytes_per_block(config, positions, ops.kv_dtype)
            check_fits(free_bytes(ops.device), sum(p.stat().st_size for p in folder.glob("*.safetensors")), least)
            read = Staging(ops.device).tensor
        checkpoint = open_checkpoint(folder, config, read)
        if ops.layout is None or cache_folders == ():
            weights = dict(_repack(checkpoint, ops))
        else:
            folders = packed_cache.default_folders(folder) if cache_folders is None else cache_folders
            weights = packed_cache.load_or_make(folder, ops.layout, lambda: _repack(checkpoint, ops), folders)

        def plain(name: str) -> torch.Tensor:
            return weights[name]["weight"].to(ops.device)

        def packed(name: str) -> Packed:
            return ops.restore(weights[name])

        return cls(
            config=config,
            ops=ops,
            embedding=plain("embedding"),
            layers=tuple(
                Layer(
                    input_norm=plain(f"{i}.input_norm"),
                    qkv=packed(f"{i}.qkv"),
                    out=packed(f"{i}.out"),
                    post_attention_norm=plain(f"{i}.post_attention_norm"),
                    gate_up=packed(f"{i}.gate_up"),
                    down=packed(f"{i}.down"),
                )
                for i in range(config.num_hidden_layers)
            ),
            norm=plain("norm"),
            head=packed("head"),
            rotary=rotary_table(config).to(ops.device),
        )

    def allocate_cache(self, blocks: int, block_size: int) -> KVCache:
        return KVCache.allocate(self.config, blocks, block_size, self.ops.kv_dtype, self.ops.device)

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Write the batch's keys and values to the cache; float32 logits [rows, V] of its `logit_rows`."""
        ops, config = self.ops, self.config
        x = ops.embed(batch.token_ids, self.embedding, batch.sampled)
        if isinstance(ops, FusedLayers):
            x = ops.run_layers(
                x, self.layers, batch, cache.keys, cache.values, self.rotary, config.sliding_window, config.rms_norm_eps
            )
        else:
            x = self.run_layers(x, batch, cache)
        return ops.head(ops.rms_norm(x, self.norm, config.rms_norm_eps), self.head)

    def run_layers(self, x: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Embeddings [T, H] → the residual stream after the last layer, for the batch's `logit_rows` [rows, H].

        FusedLayers must give the same, but for rounding.
        """
        ops, eps = self.ops, self.config.rms_norm_eps
        residual, prompt_tokens = x, batch.prompt_tokens
        for i, layer in enumerate(self.layers):
            keys, values = cache.keys[i], cache.values[i]
            if i == 0:
                x = ops.rms_norm(residual, layer.input_norm, eps)
            else:
                x, residual = ops.add_rms_norm(x, residual, layer.input_norm, eps)
            qkv = ops.awq_linear(x, layer.qkv, prompt_tokens)
            q = ops.rotate_and_cache(qkv, batch, self.rotary, keys, values)
            attended = ops.attention(q, keys, values, batch, self.config.sliding_window)
            if i == len(self.layers) - 1:
                # The other tokens' keys and values are written, and nothing else of them is needed.
                attended, residual, prompt_tokens = (t[batch.logit_rows] for t in (attended, residual, prompt_tokens))
            x = ops.awq_linear(attended, layer.out, prompt_tokens)
            x, residual = ops.add_rms_norm(x, residual, layer.post_attention_norm, eps)
            gate_up = ops.awq_linear(x, layer.gate_up, prompt_tokens)
            x = ops.awq_linear(ops.silu_and_mul(gate_up), layer.down, prompt_tokens)
        return x + residual


def rotary_table(config: ModelConfig) -> torch.Tensor:
    """float32 [max_positions, D]: cos then sin of position * theta^(-2i/D) (Su et al. 2021, eq. 15)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _repack(checkpoint: Checkpoint, ops: Ops) -> Iterator[tuple[str, Packed]]:
    """Every weight of the model by the name that `Mistral.load` asks for. Norms and the embedding stay as they are.

    Small ones come first, so that none is cut from a GPU's memory that packing larger ones needed for a moment: what is
    left of it could not be returned, 0.29 GB for Starling if it were packed layer by layer.
    """
    layers = [f"model.layers.{i}" for i in range(checkpoint.config.num_hidden_layers)]
    embedding = checkpoint.tensor("model.embed_tokens.weight")
    yield "embedding", {"weight": embedding}
    yield "norm", {"weight": checkpoint.tensor("model.norm.weight")}
    for i, layer in enumerate(layers):
        yield f"{i}.input_norm", {"weight": checkpoint.tensor(f"{layer}.input_layernorm.weight")}
        yield f"{i}.post_attention_norm", {"weight": checkpoint.tensor(f"{layer}.post_attention_layernorm.weight")}
    for kind, names in LINEARS.items():
        for i, layer in enumerate(layers):
            yield (
                f"{i}.{kind}",
                ops.pack_awq(
                    concatenate([checkpoint.linear(f"{layer}.{name}") for name in names]), paired=kind == "gate_up"
                ),
            )
    tied = checkpoint.config.tie_word_embeddings
    yield "head", ops.pack_head(embedding if tied else checkpoint.tensor("lm_head.weight"))
