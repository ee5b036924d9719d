"""What the device knows for penalties: its own counts and a step's tail together are all tokens of a sequence."""

import numpy as np

from starling.engine.cache import BlockCache
from starling.engine.frame import TAIL
from starling.engine.inputs import StepInputs
from starling.engine.scheduler import Work
from starling.engine.sequence import SamplingParams, Sequence
from starling.engine.shaping import Shaping
from starling.model.ops.cuda.sampling import SETTINGS


def test_a_row_that_a_sequence_returns_to_is_recounted() -> None:
    """Other tests cover a change of sequence; today's scheduler never brings one back to a row that it has left."""
    recounted = []
    shaping = Shaping(lambda row, tokens, prompt_length: recounted.append((row, len(tokens))))
    books = BlockCache(blocks=64, block_size=16, rows=2, max_positions=256)
    sequence = Sequence(0, [1, 2], SamplingParams(200, frozenset(), seed=0, frequency_penalty=0.5))
    for row in (0, 1, 0):
        sequence.row = row
        for _ in range(3 * TAIL):
            plan = [Work(sequence, len(sequence.tokens) - 1, 1, [], samples=True)]
            settings, tail = np.zeros((1, SETTINGS.itemsize), dtype=np.uint8), np.zeros(TAIL, dtype=np.int32)
            shaping.write(plan, StepInputs.of(plan, books), settings, tail, np.zeros((1, 1), dtype=np.uint32))
            sequence.tokens.append(len(sequence.tokens))
    assert recounted == [(0, 2), (1, 2 + 3 * TAIL), (0, 2 + 6 * TAIL)]


def test_rows_that_a_step_leaves_unused_are_cleared() -> None:
    """A captured step draws from them anyway; settings that an earlier one has left there would count tokens."""
    books = BlockCache(blocks=4, block_size=16, rows=1, max_positions=64)
    sequence = Sequence(0, [1, 2], SamplingParams(9, frozenset(), seed=0, frequency_penalty=0.5))
    sequence.row = 0
    plan = [Work(sequence, 1, 1, [], samples=True)]
    settings, tail = np.full((3, SETTINGS.itemsize), 77, dtype=np.uint8), np.zeros(3 * TAIL, dtype=np.int32)
    shaping = Shaping(lambda row, tokens, prompt_length: None)
    shaping.write(plan, StepInputs.of(plan, books), settings, tail, np.zeros((3, 1), dtype=np.uint32))
    assert settings[0].any() and not settings[1:].any()
