"""A planned step as numpy arrays: all that the device needs, before anything is copied to it."""

from typing import NamedTuple

import numpy as np

from starling.engine.cache import BlockCache
from starling.engine.sampling import uniform
from starling.engine.scheduler import Work


class StepInputs(NamedTuple):
    """The plan's tokens, flattened in plan order, and how to draw from each row of logits. Shares no memory with books.

    A token that the previous step samples, and that the host may not know yet, is written as -(1 + its row among that
    step's sampled ids). The first eight fields become a model.batch.Batch, whose `sampled` resolves those tokens.
    """

    token_ids: np.ndarray  # int64 [tokens]
    positions: np.ndarray  # int32 [tokens]
    slots: np.ndarray  # int32 [tokens]
    query_starts: np.ndarray  # int32 [works + 1]
    context_lens: np.ndarray  # int32 [works]
    block_tables: np.ndarray  # int32 [works, blocks]: as wide as the longest context needs
    prompt_tokens: np.ndarray  # bool [tokens]
    logit_rows: np.ndarray  # int64 [rows]: a row for the last token of each sampling work, and for each of its drafts
    temperature: np.ndarray  # float64 [rows]; this and the rest are the arguments of Ops.sample
    top_k: np.ndarray  # int64 [rows]
    top_p: np.ndarray  # float64 [rows]
    min_p: np.ndarray  # float64 [rows]
    uniform: np.ndarray  # float64 [rows]; 0 where the temperature is 0

    @classmethod
    def of(cls, plan: list[Work], books: BlockCache) -> "StepInputs":
        tokens: list[int] = []
        logit_rows: list[int] = []
        shapes: list[tuple[int, int, int, int]] = []
        filters: list[tuple[float, int, float, float]] = []
        draws: list[float] = []
        for work in plan:
            sequence, start, count, drafts = work.sequence, work.start, work.count, work.drafts
            if work.source >= 0:
                tokens.append(-1 - work.source)
            elif count == 1:
                tokens.append(sequence.tokens[start])
            else:
                tokens += sequence.tokens[start : start + count]
            if drafts:
                tokens += drafts
            if work.samples:
                params = sequence.params
                for position in range(start + count, start + count + 1 + len(drafts)):
                    filters.append(params.filters)
                    draws.append(uniform(params.seed, position) if params.temperature else 0.0)
                logit_rows += range(len(tokens) - 1 - len(drafts), len(tokens))
            shapes.append((start, count + len(drafts), sequence.row, sequence.prompt_length))
        start_of, size_of, row_of, prompt_of = np.array(shapes, dtype=np.int32).T
        query_starts = np.zeros(len(plan) + 1, dtype=np.int32)
        np.cumsum(size_of, out=query_starts[1:])
        positions = np.arange(len(tokens), dtype=np.int32) + np.repeat(start_of - query_starts[:-1], size_of)
        blocks = books.tables[np.repeat(row_of, size_of), positions // books.block_size]
        contexts = start_of + size_of
        width = -(-int(contexts.max()) // books.block_size)
        temperature, top_k, top_p, min_p = np.array(filters, dtype=np.float64).reshape(-1, 4).T.copy()
        return cls(
            token_ids=np.array(tokens, dtype=np.int64),
            positions=positions,
            slots=blocks * books.block_size + positions % books.block_size,
            query_starts=query_starts,
            context_lens=contexts,
            block_tables=books.tables[row_of, :width],
            prompt_tokens=positions < np.repeat(prompt_of, size_of),
            logit_rows=np.array(logit_rows, dtype=np.int64),
            temperature=temperature,
            top_k=top_k.astype(np.int64),
            top_p=top_p,
            min_p=min_p,
            uniform=np.array(draws, dtype=np.float64),
        )


def split(plan: list[Work], sampled: list[int]) -> list[list[int]]:
    """A step's sampled ids, in the order of its logit rows, by work."""
    result: list[list[int]] = []
    row = 0
    for work in plan:
        count = 1 + len(work.drafts) if work.samples else 0
        result.append(sampled[row : row + count])
        row += count
    return result
