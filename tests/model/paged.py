"""Random steps over a paged cache, for tests of attention and of whole models."""

import random
from dataclasses import dataclass

import torch

from starling.model.batch import Batch


@dataclass(frozen=True)
class Piece:
    """Some consecutive tokens of one request: `count` of them, the first at position `start`."""

    table: list[int]  # the request's blocks
    start: int
    count: int
    prompt: bool = True


def random_table(rng: random.Random, positions: int, block_size: int, free: list[int]) -> list[int]:
    """Blocks for `positions` positions, taken from `free` in random order."""
    blocks = rng.sample(free, -(-positions // block_size))
    for block in blocks:
        free.remove(block)
    return blocks


def step(pieces: list[Piece], block_size: int, token_ids: torch.Tensor | None = None) -> Batch:
    """The pieces as one batch; every row's logits are wanted."""
    positions = [p for piece in pieces for p in range(piece.start, piece.start + piece.count)]
    slots = [
        piece.table[p // block_size] * block_size + p % block_size
        for piece in pieces
        for p in range(piece.start, piece.start + piece.count)
    ]
    width = max(-(-(piece.start + piece.count) // block_size) for piece in pieces)
    tables = [(piece.table + [-1] * width)[:width] for piece in pieces]
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + piece.count)
    int32 = torch.int32
    return Batch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64) if token_ids is None else token_ids,
        positions=torch.tensor(positions, dtype=int32),
        slots=torch.tensor(slots, dtype=int32),
        query_starts=torch.tensor(starts, dtype=int32),
        context_lens=torch.tensor([piece.start + piece.count for piece in pieces], dtype=int32),
        block_tables=torch.tensor(tables, dtype=int32),
        prompt_tokens=torch.tensor([piece.prompt for piece in pieces for _ in range(piece.count)]),
        logit_rows=torch.arange(len(positions)),
    )
