"""One request, one seed: bit-identical logits and the same tokens, whatever happens around it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from starling.engine.cache import BlockCache
from starling.engine.inputs import StepInputs, split
from starling.engine.runner import Done, Runner, Step
from starling.engine.sampling import RowRules, rules
from starling.engine.scheduler import Limits, Scheduler, Work
from starling.engine.sequence import SamplingParams, Sequence, TokenConstraint
from starling.engine.speculation import PromptLookup
from starling.model.batch import Batch
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral
from starling.model.ops.cpu import CpuOps
from tests.engine.fake_model import Loop
from tests.model.tiny import write_checkpoint

WINDOW = 40  # positions; shorter than the conversations below
VOCABULARY = 331


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(random.SystemRandom().randrange(2**32))
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, sliding_window=WINDOW, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module", params=["float32", "int16", "int8", "auto"])
def model(request: pytest.FixtureRequest, folder: Path) -> Mistral:
    kv_dtype = torch.float32 if request.param == "float32" else torch.float16
    return Mistral.load(folder, CpuOps(precision=request.param, kv_dtype=kv_dtype))


class Deferred:
    """A step computed when its result is asked for, as late as a device may."""

    def __init__(self, result: Callable[[], list[list[int]]]) -> None:
        self.result = result


class Recording:
    """A model that keeps the logits of its last step, before anything changed them."""

    def __init__(self, model: Mistral) -> None:
        self._model = model
        self.ops = model.ops

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        logits = self._model.forward(batch, cache)
        self.logits = logits.clone()
        return logits


class LabRunner(Runner):
    """The CPU's runner, made to overlap if asked; keeps every logit by sequence and position."""

    def __init__(self, model: Mistral, cache: KVCache, books: BlockCache, overlaps: bool) -> None:
        self._recording = Recording(model)
        super().__init__(self._recording, cache, books)  # type: ignore[arg-type]
        self.overlaps = overlaps
        self.logits: dict[tuple[int, int], torch.Tensor] = {}

    def start(self, plan: list[Work]) -> Step:
        inputs, row_rules = StepInputs.of(plan, self._books), rules(plan)
        step = Deferred(lambda: self._finish(plan, inputs, row_rules))
        return step if self.overlaps else Done(step.result())

    def _finish(self, plan: list[Work], inputs: StepInputs, row_rules: list[RowRules]) -> list[list[int]]:
        sampled = split(plan, self.compute(inputs, row_rules).tolist())
        row = 0
        for work, tokens in zip(plan, sampled, strict=True):
            for ahead in range(len(tokens)):
                if work.drafts[:ahead] == tokens[:ahead]:
                    position = work.start + work.count + ahead
                    self.logits[work.sequence.arrival, position] = self._recording.logits[row + ahead]
            row += len(tokens)
        return sampled


class Lab:
    """A scheduler and a model, driven by hand; keeps every logit by sequence and position."""

    def __init__(
        self, model: Mistral, overlaps: bool = False, blocks: int = 256, block_size: int = 16, **limits: int
    ) -> None:
        chosen = Limits(**{"max_running": 16, "prefill_tokens": 64, "speculative_rows": 0, **limits})
        self.books = BlockCache(blocks, block_size, chosen.max_running, 1024, WINDOW)
        self.scheduler = Scheduler(self.books, chosen)
        self.runner = LabRunner(model, model.allocate_cache(blocks, block_size), self.books, overlaps)
        self.loop = Loop(self.scheduler, self.runner)
        self._arrivals = 0

    def add(self, prompt: list[int], params: SamplingParams, constraint: TokenConstraint | None = None) -> Sequence:
        lookup = PromptLookup() if self.scheduler.limits.speculative_rows else None
        sequence = Sequence(self._arrivals, prompt, params, constraint, lookup)
        self._arrivals += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        self.loop.step()
        self.books.check(self.scheduler.running)

    def drain(self) -> None:
        while not self.loop.idle:
            self.step()
        assert self.books.available == self.books.blocks

    def answer(self, sequence: Sequence) -> tuple[list[int], list[torch.Tensor]]:
        """What was generated, and the logits that each token was drawn from."""
        generated = sequence.tokens[sequence.prompt_length :]
        first = sequence.prompt_length
        return generated, [self.runner.logits[sequence.arrival, first + i] for i in range(len(generated))]


def request(seed: int, length: int = 90) -> tuple[list[int], SamplingParams]:
    dice = random.Random(seed)
    # A small vocabulary, so that prompt lookup finds something.
    prompt = [dice.randrange(3, 12) for _ in range(length)]
    params = SamplingParams(
        max_tokens=40,
        stop_ids=frozenset(),
        seed=seed,
        temperature=dice.choice([0.0, 0.8]),
        top_p=0.9,
        repetition_penalty=dice.choice([1.0, 1.1]),
    )
    return prompt, params


@contextmanager
def same_as_alone(
    model: Mistral, seed: int, length: int = 90
) -> Iterator[tuple[list[int], SamplingParams, list[tuple[Lab, Sequence]]]]:
    """Collects (lab, sequence) pairs, and compares each with the answer that the request gets alone."""
    prompt, params = request(seed, length)
    alone = Lab(model, prefill_tokens=512)
    sequence = alone.add(prompt, params)
    alone.drain()
    expected, expected_logits = alone.answer(sequence)
    others: list[tuple[Lab, Sequence]] = []
    yield prompt, params, others
    assert others
    for lab, other in others:
        tokens, logits = lab.answer(other)
        assert tokens == expected, f"request {seed}"
        assert all(torch.equal(a, b) for a, b in zip(logits, expected_logits, strict=True)), f"request {seed}"


@pytest.fixture
def seed() -> int:
    return random.SystemRandom().randrange(2**32)


@pytest.fixture(params=[False, True], ids=["in turn", "overlapped"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_in_a_batch_of_sixteen(model: Mistral, overlaps: bool, seed: int) -> None:
    with same_as_alone(model, seed) as (prompt, params, others):
        lab = Lab(model, overlaps)
        for i in range(7):
            lab.add(*request(seed + 1 + i, length=5 + 11 * i))
        others.append((lab, lab.add(prompt, params)))
        for i in range(8):
            lab.add(*request(seed + 20 + i, length=5 + 11 * i))
        lab.drain()


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_with_other_chunk_sizes(model: Mistral, overlaps: bool, seed: int, chunk: int) -> None:
    with same_as_alone(model, seed) as (prompt, params, others):
        lab = Lab(model, overlaps, prefill_tokens=chunk, block_size=16 if chunk % 2 else 32)
        others.append((lab, lab.add(prompt, params)))
        lab.drain()


def test_after_preemptions(model: Mistral, overlaps: bool, seed: int) -> None:
    with same_as_alone(model, seed, length=12) as (prompt, params, others):
        lab = Lab(
            model, overlaps, blocks=14, block_size=8, prefill_tokens=48
        )  # each begins with 2 blocks and ends with 7
        for i in range(4):
            lab.add(*request(seed + 1 + i, length=12))
        others.append((lab, lab.add(prompt, params)))
        lab.drain()
        assert lab.scheduler.counters.preemptions > 0


def test_with_a_cached_prompt(model: Mistral, overlaps: bool, seed: int) -> None:
    with same_as_alone(model, seed) as (prompt, params, others):
        lab = Lab(model, overlaps)
        lab.add([*prompt[:70], 5, 5, 5], params)
        lab.drain()
        for _ in range(2):
            others.append((lab, lab.add(prompt, params)))
            lab.drain()
        assert [other.cached for _, other in others] == [64, 80]


def test_with_drafts(model: Mistral, overlaps: bool, seed: int) -> None:
    with same_as_alone(model, seed) as (prompt, params, others):
        for rows in (4, 16):
            lab = Lab(model, overlaps, speculative_rows=rows)
            others.append((lab, lab.add(prompt, params)))
            lab.drain()


def test_drafts_change_no_answer(model: Mistral, overlaps: bool, seed: int) -> None:
    """Over many prompts at once, greedy and sampled: plain and speculative decoding agree, and drafts were proposed."""
    plain, speculative = Lab(model), Lab(model, overlaps, speculative_rows=64)
    pairs = []
    for i in range(24):
        prompt, params = request(seed + i, length=12 + i)
        prompt = prompt * 2
        pairs.append((plain.add(prompt, params), speculative.add(prompt, params)))
    plain.drain()
    speculative.drain()
    assert [a.tokens for a, _ in pairs] == [b.tokens for _, b in pairs], f"seed {seed}"
    assert speculative.scheduler.counters.proposed > 0


def test_the_next_turn_over_generated_tokens(model: Mistral, overlaps: bool, seed: int) -> None:
    """A cached prefix that holds an answer: exact unless prompts and answers are rounded differently."""
    prompt, params = request(seed)
    lab = Lab(model, overlaps)
    first = lab.add(prompt, params)
    lab.drain()
    turn = [*first.tokens, 9, 8, 7]
    second = lab.add(turn, params)
    lab.drain()
    fresh = Lab(model)
    again = fresh.add(turn, params)
    fresh.drain()
    assert second.cached is not None and second.cached >= 112
    if model.ops.precision != "auto":  # type: ignore[attr-defined]
        assert lab.answer(second)[0] == fresh.answer(again)[0]
        assert torch.equal(lab.runner.logits[second.arrival, len(turn)], fresh.runner.logits[again.arrival, len(turn)])


class Parity:
    """A grammar: odd and even tokens take turns."""

    fault: str | None = None

    def __init__(self) -> None:
        self._count = 0

    def mask(self) -> np.ndarray:
        return np.full(-(-VOCABULARY // 32), 0x55555555 << self._count % 2, dtype=np.int64).astype(np.int32)

    def advance(self, token: int) -> None:
        assert token % 2 == self._count % 2
        self._count += 1


def test_under_a_grammar_beside_others(model: Mistral, seed: int) -> None:
    prompt, params = request(seed)
    answers = []
    for overlaps in (False, True):
        lab = Lab(model, overlaps, speculative_rows=4)
        others = [lab.add(*request(seed + 1 + i)) for i in range(2)]
        constrained = lab.add(prompt, params, Parity())
        lab.drain()
        answers.append([sequence.tokens for sequence in [constrained, *others]])
    assert answers[0] == answers[1], f"request {seed}"


def test_cancelled_and_failed_neighbours_change_nothing(model: Mistral, overlaps: bool, seed: int) -> None:
    """Blocks of requests that end with a step in flight go to others at once; few are free, so they are reused."""
    dice = random.Random(seed)
    with same_as_alone(model, seed, length=12) as (prompt, params, others):
        lab = Lab(model, overlaps, blocks=24, block_size=8, prefill_tokens=48)
        watched = lab.add(prompt, params)
        others.append((lab, watched))
        neighbours: list[Sequence] = []
        while not lab.loop.idle:
            if len(neighbours) < 30:
                neighbours.append(lab.add(*request(seed + 1 + len(neighbours), length=12)))
            if dice.random() < 0.5:
                lab.scheduler.remove(dice.choice(neighbours))
            # No step of the watched one may fail.
            if watched in lab.scheduler.running or watched in lab.scheduler.waiting or dice.random() < 0.5:
                lab.step()
            else:
                lab.loop.step(breaks=dice.choice(["start", "result"]))


def test_runner_is_what_the_lab_does(model: Mistral) -> None:
    prompt, params = request(1)
    lab = Lab(model)
    sequence = lab.add(prompt, params)
    lab.drain()
    books = BlockCache(64, 16, 4, 1024, WINDOW)
    scheduler = Scheduler(books, Limits(max_running=4, prefill_tokens=64, speculative_rows=0))
    runner = Runner(model, model.allocate_cache(64, 16), books)
    other = Sequence(0, prompt, params)
    scheduler.add(other)
    while scheduler.running or scheduler.waiting:
        plan = scheduler.plan()
        assert plan
        scheduler.complete(plan, runner.start(plan).result())
    assert other.tokens == sequence.tokens
