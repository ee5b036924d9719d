"""Attention over the paged fp16 cache on a GPU: a step's plan, rotary and KV write, attention itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from starling.errors import DeviceError
from starling.model.batch import Batch
from starling.model.ops.cuda.module import Module

# As in native/attention.cu.
THREADS = 128
SPLIT = 128  # keys
FEW_ROWS = 16  # in a tile (tokens times the heads of a group)
MANY_ROWS = 64
MAX_HEAD_DIM = 128
FEW_TOKENS = 16  # a request with more tokens in a step is a prompt
TILE_INTS = 8
RANGE_INTS = 16
NO_WINDOW = 1 << 30
RESERVED_SHARED_BYTES = 1 << 10  # what each block takes of a multiprocessor's shared memory beyond its own


@dataclass(frozen=True)
class AttentionPlan:
    """What one step's layers share, on the device. See plan_attention in native/attention.cu."""

    window: int
    blocks: int  # of each layer's launch
    counts: torch.Tensor  # int32 [2]
    tiles: torch.Tensor  # int32 [tiles, TILE_INTS]
    prompt_tiles: torch.Tensor | None  # int32 [tiles, TILE_INTS]; None: no request can have enough tokens to need any
    ranges: torch.Tensor  # int32 [ranges, RANGE_INTS]
    counters: torch.Tensor  # int32 [tiles, kv_heads]: 0 between launches


class AttentionKernels:
    """One model's attention on one device. A token's result does not depend on the rest of its step, bit for bit.

    A token may be padding: its slot is -1, and its request, after the real ones, has context 0 or no tokens. Nothing is
    read or written for it, so its row of an output is left uninitialised.
    """

    def __init__(
        self,
        load: Callable[[str], Module],
        device: torch.device,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_positions: int,
        ranges: int | None = None,
    ) -> None:
        """`ranges`: how many pieces a step's decodes are cut into; None: as many as the device runs blocks at once.

        Raises DeviceError if the kernels do not support the shape.
        """
        self._group = heads // kv_heads
        assert heads == kv_heads * self._group, (heads, kv_heads)
        if head_dim % 16 or head_dim > MAX_HEAD_DIM or self._group > FEW_ROWS:
            raise DeviceError(
                f"head_dim {head_dim} with {self._group} query heads per key/value head: the CUDA kernels take a "
                f"multiple of 16 up to {MAX_HEAD_DIM}, and at most {FEW_ROWS}."
            )
        self._heads, self._kv_heads, self._dim = heads, kv_heads, head_dim
        self._device = device
        self._attention, self._rotary = load("attention"), load("rotary")
        self._padded_dim = 64 if head_dim <= 64 else 128
        self._scale = math.log2(math.e) / math.sqrt(head_dim)
        self._ranges = ranges or _resident_blocks(device, self.shared_bytes)
        self._max_splits = -(-max_positions // SPLIT)
        # At most one (tile, head)'s splits per range; 84 ranges (A40) of 64 splits (8,192 positions): 45 MB.
        self._scratch = torch.empty(
            self._ranges, self._max_splits, FEW_ROWS, self._padded_dim + 2, dtype=torch.float32, device=device
        )

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, as native/attention.cu lays it out."""
        units = 4 * 2 * 32 * self._padded_dim * 2
        parts = 4 * FEW_ROWS * (self._padded_dim + 8) * 4
        return units + parts + 4 * FEW_ROWS * 2 * 4 + 16

    def plan(self, batch: Batch, window: int | None) -> AttentionPlan:
        """The work lists that every layer of a step goes through. Their sizes depend on the batch's shapes only."""
        tokens, requests = batch.positions.numel(), batch.context_lens.numel()
        few, many = FEW_ROWS // self._group, MANY_ROWS // self._group
        tiles = min(tokens, requests * -(-FEW_TOKENS // few))
        prompts = 0 if batch.decodes else tokens // (FEW_TOKENS + 1)
        prompt_tiles = tokens // many + prompts if prompts else 0
        plan = AttentionPlan(
            window=NO_WINDOW if window is None else window,
            blocks=max(min(self._ranges, tiles * self._kv_heads * self._max_splits), prompt_tiles * self._kv_heads, 1),
            counts=self._ints(2),
            tiles=self._ints(tiles, TILE_INTS),
            prompt_tiles=self._ints(prompt_tiles, TILE_INTS) if prompts else None,
            ranges=self._ints(self._ranges, RANGE_INTS),
            counters=self._ints(tiles, self._kv_heads),
        )
        self._attention.launch(
            "plan_attention",
            (1, 1, 1),
            256,
            3 * 256 * 4,
            batch.query_starts,
            batch.context_lens,
            requests,
            self._group,
            self._kv_heads,
            plan.window,
            self._ranges,
            plan.counts,
            plan.tiles,
            plan.prompt_tiles,
            plan.ranges,
            plan.counters,
        )
        return plan

    def attend(
        self,
        qkv: torch.Tensor,
        batch: Batch,
        plan: AttentionPlan,
        rotary: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """rotate_and_cache, then attention, bit for bit; in one launch if no request can be a prompt."""
        if plan.prompt_tiles is None and self._dim == self._padded_dim:
            return self._attend(qkv, rotary, keys, values, batch, plan)
        q = self.rotate_and_cache(qkv, batch, rotary, keys, values)
        return self.attention(q, keys, values, batch, plan)

    def rotate_and_cache(
        self, qkv: torch.Tensor, batch: Batch, rotary: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """fp16 [T, (heads + 2 * kv_heads) * D] → q fp16 [T, heads, D] rotated; k and v go to the batch's slots."""
        tokens, block_size = qkv.shape[0], keys.shape[2]
        q = torch.empty(tokens, self._heads, self._dim, dtype=torch.float16, device=qkv.device)
        threads = tokens * (self._heads + 2 * self._kv_heads) * (self._dim // 16)
        self._rotary.launch(
            "rotate_and_cache",
            (-(-threads // 128), 1, 1),
            128,
            0,
            qkv,
            batch.positions,
            batch.slots,
            rotary,
            q,
            keys,
            values,
            tokens,
            self._heads,
            self._kv_heads,
            self._dim,
            block_size,
        )
        return q

    def attention(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, plan: AttentionPlan
    ) -> torch.Tensor:
        """fp16 [T, heads, D] over one layer's cache [blocks, kv_heads, block_size, D] → fp16 [T, heads * D]."""
        return self._attend(q, None, keys, values, batch, plan)

    def _attend(
        self,
        q: torch.Tensor,
        rotary: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: Batch,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        out = torch.empty(q.shape[0], self._heads * self._dim, dtype=torch.float16, device=q.device)
        self._attention.launch(
            f"attention_{self._padded_dim}",
            (plan.blocks, 1, 1),
            THREADS,
            self.shared_bytes,
            q,
            rotary,
            keys,
            values,
            out,
            batch.block_tables,
            batch.block_tables.shape[1],
            self._heads,
            self._kv_heads,
            self._dim,
            keys.shape[2],
            plan.window,
            self._scale,
            plan.counts,
            plan.tiles,
            plan.prompt_tiles,
            plan.ranges,
            self._ranges,
            plan.counters,
            self._scratch,
            self._max_splits,
        )
        return out

    def _ints(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=self._device)


def _resident_blocks(device: torch.device, shared_bytes: int) -> int:
    properties = torch.cuda.get_device_properties(device)
    each = properties.shared_memory_per_multiprocessor // (shared_bytes + RESERVED_SHARED_BYTES)
    # Registers: 255 a thread, so a multiprocessor's 65,536 hold two blocks.
    return int(properties.multi_processor_count) * max(1, min(2, each))
