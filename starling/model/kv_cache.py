"""Storage for keys and values: one pool of equal blocks per layer. Who owns which block is the engine's business."""

from dataclasses import dataclass

import torch

from starling.model.config import ModelConfig
from starling.model.huge_pages import empty


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, in blocks of `block_size` positions."""

    keys: torch.Tensor  # [layers, blocks, kv_heads, block_size, head_dim]
    values: torch.Tensor  # same shape and dtype

    @classmethod
    def allocate(
        cls, config: ModelConfig, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> "KVCache":
        shape = (config.num_hidden_layers, blocks, config.num_key_value_heads, block_size, config.head_dim)
        # Not zeroed: on a CPU, memory is then committed only as blocks are first written.
        return cls(empty(shape, dtype, device), empty(shape, dtype, device))

    @property
    def blocks(self) -> int:
        return self.keys.shape[1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[3]

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        return 2 * config.num_hidden_layers * config.kv_size * block_size * dtype.itemsize
