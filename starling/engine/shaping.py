"""What the sampling kernels are told of a step's rows of logits: how to draw, penalties, bans, grammars.

The kernels count the tokens of penalised sequences in a table, a row for each row of the block tables. Here it is
known what a row of it holds: whose tokens, and how many of them. What it lacks is named with the step.
"""

from collections.abc import Callable

import numpy as np

from starling.engine.frame import TAIL
from starling.engine.inputs import StepInputs
from starling.engine.sampling import clear, permitted, rows_too_short
from starling.engine.scheduler import Work
from starling.engine.sequence import Sequence
from starling.model.ops.cuda.sampling import SETTINGS, settings_of

ALL = np.uint32(0xFFFFFFFF)  # a word of a mask that forbids nothing


class Shaping:
    """`recount(row, tokens, prompt_length)` makes a row of the table anew."""

    def __init__(self, recount: Callable[[int, list[int], int], None]) -> None:
        self._recount = recount
        self._counted: dict[int, tuple[int, int]] = {}  # row → arrival of its sequence, its tokens in the table

    def write(
        self, plan: list[Work], inputs: StepInputs, settings: np.ndarray, tail: np.ndarray, masks: np.ndarray
    ) -> int:
        """Fill uint8 [rows, 64], int32 [tokens] and uint32 [rows, words]; the number of masks that are used."""
        rules = settings.view(SETTINGS)[:, 0]
        rules[:] = 0
        rules[: len(inputs.logit_rows)] = settings_of(
            inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, inputs.uniform
        )
        row = used = end = 0
        for work in plan:
            if not work.samples:
                continue
            params, constraint = work.sequence.params, work.sequence.constraint
            if params.penalized or params.min_tokens or constraint is not None:
                own = rules[row : row + 1 + len(work.drafts)]
                if params.penalized:
                    end = self._penalize(work, own, tail, end)
                short = rows_too_short(work)
                for first, last, banned in ((0, short, params.stop_ids), (short, len(own), frozenset[int]())):
                    if first < last and (banned or constraint is not None):
                        if constraint is None:
                            masks[used] = ALL
                            clear(masks[used], banned)
                        else:
                            masks[used] = permitted(constraint, banned)
                        used += 1
                        own["mask"][first:last] = used
            row += 1 + len(work.drafts)
        return used

    def _penalize(self, work: Work, own: np.ndarray, tail: np.ndarray, begin: int) -> int:
        """The rows `own` of one sequence; where the next one's tail begins."""
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
        """How many of its tokens the table holds: all that are known, if it held another sequence's before.

        Or the same one's from before a pause, after which it went on in another row for a while.
        """
        arrival, counted = self._counted.get(sequence.row, (-1, 0))
        if arrival == sequence.arrival and len(sequence.tokens) - counted < TAIL:
            return counted
        self._recount(sequence.row, sequence.tokens, sequence.prompt_length)
        return len(sequence.tokens)
