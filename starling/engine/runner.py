"""A planned step on the device: the plan as tensors, one forward pass, one token per sampled row."""

from typing import Protocol

import numpy as np
import torch

from starling.engine.cache import BlockCache
from starling.engine.sampling import Sampler
from starling.engine.scheduler import Work
from starling.model.batch import Batch
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral


class StepRunner(Protocol):
    """Computes one step. Tests and benchmarks put a constant in its place."""

    def run(self, plan: list[Work]) -> list[list[int]]:
        """Tokens per work: none for a chunk inside a prompt, else one for the last row and one after each draft."""
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
        logits = self._model.forward(build_batch(plan, self._books, self._model.ops.device), self._cache)
        return self._sampler.sample(logits, plan)


def build_batch(plan: list[Work], books: BlockCache, device: torch.device) -> Batch:
    """The plan's tokens, flattened in plan order."""
    tokens: list[int] = []
    positions: list[int] = []
    owners: list[int] = []  # table row of each token
    prompt: list[bool] = []
    starts = [0]
    contexts: list[int] = []
    logit_rows: list[int] = []
    for work in plan:
        sequence, start = work.sequence, work.start
        end = start + work.count
        tokens += sequence.tokens[start:end]
        tokens += work.drafts
        size = work.count + len(work.drafts)
        positions += range(start, start + size)
        owners += [sequence.row] * size
        of_prompt = max(0, min(end, sequence.prompt_length) - start)
        prompt += [True] * of_prompt + [False] * (size - of_prompt)
        contexts.append(start + size)
        starts.append(starts[-1] + size)
        if work.samples:
            logit_rows += range(starts[-1] - 1 - len(work.drafts), starts[-1])
    at = np.array(positions, dtype=np.int32)
    row = np.array(owners, dtype=np.int32)
    slots = books.tables[row, at // books.block_size] * books.block_size + at % books.block_size
    width = -(-max(contexts) // books.block_size)
    tables = books.tables[[work.sequence.row for work in plan], :width]

    def tensor(values: list[int] | list[bool] | np.ndarray, dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype)).to(device)

    return Batch(
        token_ids=tensor(tokens, np.int64),
        positions=tensor(at, np.int32),
        slots=tensor(slots, np.int32),
        query_starts=tensor(starts, np.int32),
        context_lens=tensor(contexts, np.int32),
        block_tables=tensor(tables, np.int32),
        prompt_tokens=tensor(prompt, np.bool_),
        logit_rows=tensor(logit_rows, np.int64),
    )
