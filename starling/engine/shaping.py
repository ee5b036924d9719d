"""The sampling kernels' inputs for a step's rows of logits: how to draw, penalties, bans, grammars.

The kernels count the tokens of penalised sequences in a table, with a row for each row of the block tables. This module
tracks what each row of it holds: whose tokens, and how many. The tokens that it lacks are passed with the step.
"""

from collections.abc import Callable

import numpy as np

from starling.engine.frame import TAIL
from starling.engine.inputs import StepInputs
from starling.engine.sampling import clear, permitted, rows_below_min_tokens, ruled
from starling.engine.scheduler import Work
from starling.engine.sequence import Sequence
from starling.model.ops.cuda.sampling import SETTINGS, settings_of

ALL = np.uint32(0xFFFFFFFF)  # a mask word that forbids nothing


class Shaping:
    """`recount(row, tokens, prompt_length)` rebuilds a row of the table."""

    def __init__(self, recount: Callable[[int, list[int], int], None]) -> None:
        self._recount = recount
        self._counted: dict[int, tuple[int, int]] = {}  # row → arrival of its sequence, its tokens counted

    def write(
        self, plan: list[Work], inputs: StepInputs, settings: np.ndarray, tail: np.ndarray, masks: np.ndarray
    ) -> int:
        """Fill uint8 [rows, 64], int32 [tokens] and uint32 [rows, words]; returns the number of masks used."""
        rules = settings.view(SETTINGS)[:, 0]
        rules[:] = 0
        rules[: len(inputs.logit_rows)] = settings_of(
            inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, inputs.uniform
        )
        used = end = 0
        for row, work in ruled(plan):
            params, constraint = work.sequence.params, work.sequence.constraint
            own = rules[row : row + 1 + len(work.drafts)]
            if params.penalized:
                end = self._penalize(work, own, tail, end)
            below = rows_below_min_tokens(work)
            for first, last, banned in ((0, below, params.stop_ids), (below, len(own), frozenset[int]())):
                if first < last and (banned or constraint is not None):
                    if constraint is None:
                        masks[used] = ALL
                        clear(masks[used], banned)
                    else:
                        masks[used] = permitted(constraint, banned)
                    used += 1
                    own["mask"][first:last] = used
        return used

    def _penalize(self, work: Work, own: np.ndarray, tail: np.ndarray, begin: int) -> int:
        """Fill in one sequence's rows, `own`; returns where the next one's tail begins."""
        sequence, params = work.sequence, work.sequence.params
        counted = self._counted_tokens(sequence)
        lacking = sequence.tokens[counted:]
        if work.source >= 0:
            lacking = [*lacking, -1 - work.source]
        tokens = lacking + work.drafts
        tail[begin : begin + len(tokens)] = tokens
        own["repetition"], own["frequency"] = params.repetition_penalty, params.frequency_penalty
        own["presence"] = params.presence_penalty
        own["table"] = 1 + sequence.row
        own["tail"] = begin
        own["seen"] = len(lacking) + np.arange(len(own))
        own["commits"][0] = len(lacking)
        self._counted[sequence.row] = (sequence.arrival, counted + len(lacking))
        return begin + len(tokens)

    def _counted_tokens(self, sequence: Sequence) -> int:
        """How many of the sequence's tokens the table holds.

        All that are known, recounted, if its row held another sequence's tokens, or its own from before a preemption
        after which it ran in another row for a while.
        """
        arrival, counted = self._counted.get(sequence.row, (-1, 0))
        if arrival == sequence.arrival and len(sequence.tokens) - counted < TAIL:
            return counted
        self._recount(sequence.row, sequence.tokens, sequence.prompt_length)
        return len(sequence.tokens)
