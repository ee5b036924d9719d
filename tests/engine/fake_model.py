"""A model of a few lines, for the loop: the next token is a function of the tokens so far."""

import zlib
from array import array
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from starling.engine.cache import BlockCache
from starling.engine.inputs import StepInputs, split
from starling.engine.runner import Step, StepRunner
from starling.engine.sampling import RowRules, rules
from starling.engine.scheduler import Outcome, Scheduler, Work
from starling.engine.sequence import Sequence

VOCABULARY = 7
SEEN = 5  # tokens that the next one depends on; no window may be shorter


def next_token(tokens: Tokens[int]) -> int:
    """Depends on the last five tokens alone, so that answers sometimes repeat and drafts are sometimes right."""
    return zlib.crc32(array("i", tokens[-SEEN:]).tobytes()) % VOCABULARY


class Rhythm:
    """A grammar: after n tokens, a token t may follow if (t + n) is not a multiple of 3."""

    def __init__(self) -> None:
        self.count = 0
        self.fault: str | None = None

    def mask(self) -> np.ndarray:
        return np.array([sum(self.allows(t) << t for t in range(VOCABULARY))], dtype=np.int32)

    def advance(self, token: int) -> None:
        assert self.allows(token)
        self.count += 1

    def allows(self, token: int) -> bool:
        return (token + self.count) % 3 != 0


def allowed_by(rule: RowRules) -> int:
    """A bit for each token that may be drawn."""
    allowed = (1 << VOCABULARY) - 1 if rule.allowed is None else int(rule.allowed[0])
    return allowed & ~sum(1 << token for token in rule.banned)


def nearest(token: int, allowed: int) -> int:
    """The first at or after `token` whose bit is set."""
    while not allowed >> token & 1:
        token = (token + 1) % VOCABULARY
    return token


class FakeRunner:
    """Computes `next_token` for every row, from what the step's own inputs and the blocks hold and nothing else.

    The keys and values of a position are its token. With `overlaps`, a step is computed when its result is asked for,
    as late as a device may.
    """

    device_counts = False

    def __init__(self, books: BlockCache, overlaps: bool = False) -> None:
        self.overlaps = overlaps
        self._books = books
        self._memory = np.full(books.blocks * books.block_size, -1)
        self._sampled: list[int] = []  # by the step before

    def start(self, plan: list[Work]) -> Step:
        step = FakeStep(self, plan)
        if not self.overlaps:
            step.compute()
        return step

    def compute(self, inputs: StepInputs, allowed: dict[int, int]) -> list[int]:
        tokens = [int(t) if t >= 0 else self._sampled[-1 - t] for t in inputs.token_ids]
        self._memory[inputs.slots] = tokens
        self._sampled = []
        for row, at in enumerate(inputs.logit_rows):
            table = inputs.block_tables[np.searchsorted(inputs.query_starts, at, side="right") - 1]
            position, size = int(inputs.positions[at]), self._books.block_size
            seen = np.arange(max(0, position - SEEN + 1), position + 1)
            assert (table[seen // size] >= 0).all()
            token = next_token(self._memory[table[seen // size] * size + seen % size].tolist())
            self._sampled.append(nearest(token, allowed.get(row, -1)))
        return self._sampled


class FakeStep:
    def __init__(self, runner: FakeRunner, plan: list[Work]) -> None:
        self._runner = runner
        self._plan = plan
        self._inputs = StepInputs.of(plan, runner._books)
        self._allowed = {rule.row: allowed_by(rule) for rule in rules(plan)}
        self._tokens: list[list[int]] | None = None

    def compute(self) -> list[list[int]]:
        self._tokens = split(self._plan, self._runner.compute(self._inputs, self._allowed))
        return self._tokens

    def result(self) -> list[list[int]]:
        return self.compute() if self._tokens is None else self._tokens


def expected_answer(
    prompt: list[int], max_tokens: int, stop_ids: frozenset[int], grammar: Rhythm | None = None, min_tokens: int = 0
) -> list[int]:
    """What plain decoding, one token at a time, gives."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        allowed = (1 << VOCABULARY) - 1 if grammar is None else int(grammar.mask()[0])
        if len(tokens) < len(prompt) + min_tokens:
            allowed = allowed & ~sum(1 << token for token in stop_ids) or allowed
        tokens.append(nearest(next_token(tokens), allowed))
        if tokens[-1] in stop_ids:
            break
        if grammar is not None:
            grammar.advance(tokens[-1])
    return tokens[len(prompt) :]


@dataclass
class Turn:
    """What one turn of the loop did."""

    plan: list[Work] | None
    outcomes: list[Outcome] = field(default_factory=list)  # of the step before, or of this one if steps do not overlap
    failed: list[Sequence] = field(default_factory=list)


class Loop:
    """A scheduler and a runner, stepped by hand as the engine's thread steps them."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.in_flight: tuple[list[Work], Step] | None = None

    @property
    def idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.waiting and self.in_flight is None

    def step(self, breaks: Literal["start", "result"] | None = None) -> Turn:
        """`breaks`: the step that is started fails at once, or the one whose result is asked for does then."""
        turn = Turn(self.scheduler.plan())
        started = None
        if turn.plan:
            started = (turn.plan, self.runner.start(turn.plan))
        if started and breaks == "start":
            self.land(turn)
            turn.failed += self.scheduler.fail(started[0])
            return turn
        self.land(turn, breaks == "result")
        self.in_flight = started
        if not self.runner.overlaps:
            self.land(turn, breaks == "result")
        return turn

    def land(self, turn: Turn, breaks: bool = False) -> None:
        flight, self.in_flight = self.in_flight, None
        if flight is None:
            return
        plan, step = flight
        sampled = step.result()
        if breaks:
            turn.failed += self.scheduler.fail(plan)
            return
        for outcome in self.scheduler.complete(plan, sampled):
            turn.outcomes.append(outcome)
            constraint = outcome.sequence.constraint
            if constraint is not None and outcome.finish is None:
                for token in outcome.tokens:
                    constraint.advance(token)
