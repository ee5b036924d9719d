"""A planned step on the device: the plan as tensors, one forward pass, one token per sampled row."""

from typing import Protocol

import numpy as np
import torch

from starling.engine.cache import BlockCache
from starling.engine.sampling import Sampler
from starling.engine.scheduler import Work
from starling.errors import DeviceError
from starling.model.batch import Batch
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral


class StepRunner(Protocol):
    """Computes one step. Tests and benchmarks put a constant in its place."""

    def run(self, plan: list[Work]) -> list[list[int]]:
        """Tokens per work: none for a chunk inside a prompt, else one for the last row and one after each draft.

        Raises DeviceError when the device is lost for good; any other exception ends this step's requests only.
        """
        ...


class Runner:
    """Runs steps on a model."""

    def __init__(self, model: Mistral, cache: KVCache, books: BlockCache) -> None:
        assert cache.blocks == books.blocks and cache.block_size == books.block_size
        self._model = model
        self._cache = cache
        self._books = books
        self._sampler = Sampler(model.ops)

    @torch.inference_mode()
    def run(self, plan: list[Work]) -> list[list[int]]:
        try:
            logits = self._model.forward(build_batch(plan, self._books, self._model.ops.device), self._cache)
            return self._sampler.sample(logits, plan)
        except torch.AcceleratorError as error:  # not OutOfMemoryError, after which the device still works
            raise DeviceError(f"The device is lost: {error}. Restart the container.") from error


def build_batch(plan: list[Work], books: BlockCache, device: torch.device) -> Batch:
    """The plan's tokens, flattened in plan order."""
    tokens: list[int] = []
    logit_rows: list[int] = []
    shapes: list[tuple[int, int, int, int]] = []
    for work in plan:
        sequence, start, count, drafts = work.sequence, work.start, work.count, work.drafts
        if count == 1:
            tokens.append(sequence.tokens[start])
        else:
            tokens += sequence.tokens[start : start + count]
        if drafts:
            tokens += drafts
        if work.samples:
            logit_rows += range(len(tokens) - 1 - len(drafts), len(tokens))
        shapes.append((start, count + len(drafts), sequence.row, sequence.prompt_length))
    start_of, size_of, row_of, prompt_of = np.array(shapes, dtype=np.int32).T
    query_starts = np.zeros(len(plan) + 1, dtype=np.int32)
    np.cumsum(size_of, out=query_starts[1:])
    positions = np.arange(len(tokens), dtype=np.int32) + np.repeat(start_of - query_starts[:-1], size_of)
    blocks = books.tables[np.repeat(row_of, size_of), positions // books.block_size]
    contexts = start_of + size_of
    width = -(-int(contexts.max()) // books.block_size)

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)

    return Batch(
        token_ids=tensor(np.array(tokens, dtype=np.int64)),
        positions=tensor(positions),
        slots=tensor(blocks * books.block_size + positions % books.block_size),
        query_starts=tensor(query_starts),
        context_lens=tensor(contexts),
        block_tables=tensor(books.tables[row_of, :width]),
        prompt_tokens=tensor(positions < np.repeat(prompt_of, size_of)),
        logit_rows=tensor(np.array(logit_rows, dtype=np.int64)),
    )
