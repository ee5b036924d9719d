"""A model of a few lines, for the loop: the next token is a function of the tokens so far."""

import zlib
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from starling.engine.cache import BlockCache
from starling.engine.frame import TAIL
from starling.engine.inputs import StepInputs, split
from starling.engine.runner import Step, StepRunner
from starling.engine.sampling import RowRules, rules
from starling.engine.scheduler import NO_TOKEN, Outcome, Scheduler, Work
from starling.engine.sequence import Sequence
from starling.engine.shaping import Shaping
from starling.model.ops.cuda.sampling import SETTINGS

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


@dataclass
class Rule:
    """What changes one row's token."""

    allowed: int = (1 << VOCABULARY) - 1  # a bit for each token that may be drawn
    history: list[int] = field(default_factory=list)  # every token so far, if they are penalised

    def apply(self, token: int) -> int:
        """Shifted by the sum of its history, then moved on to the first allowed token."""
        token = (token + sum(self.history)) % VOCABULARY
        while not self.allowed >> token & 1:
            token = (token + 1) % VOCABULARY
        return token

    @classmethod
    def of(cls, rule: RowRules) -> "Rule":
        allowed = cls.allowed if rule.allowed is None else int(rule.allowed[0])
        return cls(allowed & ~sum(1 << token for token in rule.banned), rule.prompt + rule.generated)


class FakeRunner:
    """Computes `next_token` for every row, from nothing but the step's own inputs and the blocks.

    The keys and values of a position are its token. With `overlaps`, a step is computed when its result is asked for,
    as late as a device may. With `device_counts`, it knows of penalties, bans and grammars only what a GPU is told.
    """

    def __init__(self, books: BlockCache, overlaps: bool = False, device_counts: bool = False) -> None:
        self.overlaps = overlaps
        self.device_counts = device_counts
        self.shaping = Shaping(lambda row, tokens, prompt_length: self.recounts.append((row, tokens)))
        self.recounts: list[tuple[int, list[int]]] = []  # of the step that is being started
        self.table: dict[int, list[int]] = {}  # tokens that the device has counted
        self.draws_nothing: Callable[[], bool] = lambda: False  # called for every row
        self._books = books
        self._memory = np.full(books.blocks * books.block_size, -1)
        self._sampled: list[int] = []  # by the previous step

    def start(self, plan: list[Work]) -> Step:
        step = ShapedStep(self, plan) if self.device_counts else FakeStep(self, plan)
        if not self.overlaps:
            step.compute()
        return step

    def resolve(self, tokens: Tokens[int]) -> list[int]:
        """Replaces references to the previous step's samples by those tokens."""
        return [int(t) if t >= 0 else self._sampled[-1 - t] for t in tokens]

    def compute(self, inputs: StepInputs, rules: dict[int, Rule]) -> list[int]:
        tokens = self.resolve(inputs.token_ids)  # type: ignore[arg-type]
        self._memory[inputs.slots] = tokens
        self._sampled = []
        drawn = []
        for row, at in enumerate(inputs.logit_rows):
            table = inputs.block_tables[np.searchsorted(inputs.query_starts, at, side="right") - 1]
            position, size = int(inputs.positions[at]), self._books.block_size
            seen = np.arange(max(0, position - SEEN + 1), position + 1)
            assert (table[seen // size] >= 0).all()
            token = next_token(self._memory[table[seen // size] * size + seen % size].tolist())
            self._sampled.append(rules.get(row, Rule()).apply(token))
            drawn.append(NO_TOKEN if self.draws_nothing() else self._sampled[-1])
        return drawn


class FakeStep:
    def __init__(self, runner: FakeRunner, plan: list[Work]) -> None:
        self._runner = runner
        self._plan = plan
        self._inputs = StepInputs.of(plan, runner._books)
        self._tokens: list[list[int]] | None = None
        self._read()

    def _read(self) -> None:
        self._rules = {rule.row: Rule.of(rule) for rule in rules(self._plan)}

    def compute(self) -> list[list[int]]:
        self._tokens = split(self._plan, self._runner.compute(self._inputs, self._rules))
        return self._tokens

    def result(self) -> list[list[int]]:
        return self.compute() if self._tokens is None else self._tokens


class ShapedStep(FakeStep):
    """Penalised tokens are in a table that belongs to the device, except those that the step's tail brings."""

    def _read(self) -> None:
        rows = len(self._inputs.logit_rows)
        self._settings = np.zeros((rows, SETTINGS.itemsize), dtype=np.uint8)
        self._tail = np.zeros(max(1, rows * TAIL), dtype=np.int32)
        self._masks = np.zeros((rows, 1), dtype=np.uint32)
        self._runner.recounts = []
        self._runner.shaping.write(self._plan, self._inputs, self._settings, self._tail, self._masks)
        self._recounts = self._runner.recounts

    def compute(self) -> list[list[int]]:
        table = self._runner.table
        table.update((row, list(tokens)) for row, tokens in self._recounts)
        self._rules, commits = {}, []
        for row, settings in enumerate(self._settings.view(SETTINGS)[:, 0]):
            rule = self._rules[row] = Rule()
            if settings["mask"]:
                rule.allowed &= int(self._masks[settings["mask"] - 1, 0])
            if settings["table"]:
                counted = table[settings["table"] - 1]
                tail = self._tail[settings["tail"] :].tolist()
                rule.history = counted + self._runner.resolve(tail[: settings["seen"]])
                commits.append((counted, self._runner.resolve(tail[: settings["commits"]])))
        for counted, tokens in commits:
            counted.extend(tokens)
        return super().compute()


def expected_answer(
    prompt: list[int],
    max_tokens: int,
    stop_ids: frozenset[int],
    grammar: Rhythm | None = None,
    min_tokens: int = 0,
    penalized: bool = False,
) -> list[int]:
    """What plain decoding, one token at a time, gives."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        rule = Rule(history=tokens if penalized else [])
        if grammar is not None:
            rule.allowed &= int(grammar.mask()[0])
        if len(tokens) < len(prompt) + min_tokens:
            rule.allowed = rule.allowed & ~sum(1 << token for token in stop_ids) or rule.allowed
        tokens.append(rule.apply(next_token(tokens)))
        if tokens[-1] in stop_ids:
            break
        if grammar is not None:
            grammar.advance(tokens[-1])
    return tokens[len(prompt) :]


@dataclass
class Turn:
    """What one turn of the loop did."""

    plan: list[Work] | None
    outcomes: list[Outcome] = field(default_factory=list)  # of the previous step; of this one if steps do not overlap
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
        """`breaks` fails the step that is started, as it starts, or the one that is collected."""
        turn = Turn(self.scheduler.plan())
        started = None
        if turn.plan:
            started = (turn.plan, self.runner.start(turn.plan))
        if started and breaks == "start":
            self.collect(turn)
            turn.failed += self.scheduler.fail(started[0])
            return turn
        self.collect(turn, breaks == "result")
        self.in_flight = started
        if not self.runner.overlaps:
            self.collect(turn, breaks == "result")
        return turn

    def collect(self, turn: Turn, breaks: bool = False) -> None:
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
