"""A step's arrays, computed by hand."""

import numpy as np

from starling.engine.cache import BlockCache
from starling.engine.inputs import StepInputs, split
from starling.engine.scheduler import Work
from starling.engine.sequence import SamplingParams, Sequence


def test_a_step_of_every_kind_of_work() -> None:
    books = BlockCache(blocks=8, block_size=4, rows=3, max_positions=16)
    sequences = []
    for arrival, (prompt, answer) in enumerate([([10, 11, 12, 13, 14, 15], []), ([20, 21, 22], [23]), ([30], [])]):
        params = SamplingParams(9, frozenset(), seed=arrival, temperature=0.5 * arrival, top_k=arrival - 1)
        sequence = Sequence(arrival, prompt, params)
        sequence.tokens += answer
        books.admit(sequence)
        assert books.grow(sequence, 6)
        sequences.append(sequence)
    first, second, third = sequences
    plan = [
        Work(third, 1, 1, [], True, source=4),
        Work(second, 3, 1, [24, 25], True),
        Work(first, 2, 3, [], False),
    ]
    inputs = StepInputs.of(plan, books)
    assert inputs.token_ids.tolist() == [-5, 23, 24, 25, 12, 13, 14]
    assert inputs.positions.tolist() == [1, 3, 4, 5, 2, 3, 4]
    assert inputs.prompt_tokens.tolist() == [False] * 4 + [True] * 3
    assert inputs.query_starts.tolist() == [0, 1, 4, 7]
    assert inputs.context_lens.tolist() == [2, 6, 5]
    assert inputs.block_tables.tolist() == [third.blocks, second.blocks, first.blocks]
    where = [(third, 1), (second, 3), (second, 4), (second, 5), (first, 2), (first, 3), (first, 4)]
    assert inputs.slots.tolist() == [4 * s.blocks[position // 4] + position % 4 for s, position in where]
    assert inputs.logit_rows.tolist() == [0, 1, 2, 3]
    assert inputs.temperature.tolist() == [1.0, 0.5, 0.5, 0.5]
    assert inputs.top_k.tolist() == [1, 0, 0, 0]
    assert np.unique(inputs.uniform).size == 4
    assert split(plan, [7, 8, 9, 6]) == [[7], [8, 9, 6], []]
