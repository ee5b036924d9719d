"""One request, one seed: the same logits to the bit and the same tokens, whatever happens around it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from starling.engine.cache import BlockCache
from starling.engine.runner import Runner, build_batch
from starling.engine.sampling import Sampler
from starling.engine.scheduler import Limits, Scheduler, Work
from starling.engine.sequence import SamplingParams, Sequence
from starling.engine.speculation import PromptLookup
from starling.model.mistral import Mistral
from starling.model.ops.cpu import CpuOps
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


class Lab:
    """A scheduler and a model, driven by hand; keeps every logit by sequence and position."""

    def __init__(self, model: Mistral, blocks: int = 256, block_size: int = 16, **limits: int) -> None:
        chosen = Limits(**{"max_running": 16, "prefill_tokens": 64, "speculative_rows": 0, **limits})
        self.books = BlockCache(blocks, block_size, chosen.max_running, 1024, WINDOW)
        self.scheduler = Scheduler(self.books, chosen)
        self._model = model
        self._cache = model.allocate_cache(blocks, block_size)
        self._sampler = Sampler(model.ops)
        self._arrivals = 0
        self.logits: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, prompt: list[int], params: SamplingParams) -> Sequence:
        lookup = PromptLookup() if self.scheduler.limits.speculative_rows else None
        sequence = Sequence(self._arrivals, prompt, params, lookup=lookup)
        self._arrivals += 1
        self.scheduler.add(sequence)
        return sequence

    @torch.inference_mode()
    def step(self) -> None:
        plan = self.scheduler.plan()
        logits = self._model.forward(build_batch(plan, self.books, torch.device("cpu")), self._cache)
        self._keep(plan, logits)
        self.scheduler.complete(plan, self._sampler.sample(logits, plan))
        self.books.check(self.scheduler.running)

    def drain(self) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            self.step()
        assert self.books.available == self.books.blocks

    def answer(self, sequence: Sequence) -> tuple[list[int], list[torch.Tensor]]:
        """What was generated, and the logits that each token was drawn from."""
        generated = sequence.tokens[sequence.prompt_length :]
        return generated, [self.logits[sequence.arrival, sequence.prompt_length + i] for i in range(len(generated))]

    def _keep(self, plan: list[Work], logits: torch.Tensor) -> None:
        row = 0
        for work in (work for work in plan if work.samples):
            for ahead in range(1 + len(work.drafts)):
                if work.drafts[:ahead] == [int(t) for t in self._drawn(work, logits, row, ahead)]:
                    self.logits[work.sequence.arrival, len(work.sequence.tokens) + ahead] = logits[row + ahead].clone()
            row += 1 + len(work.drafts)

    def _drawn(self, work: Work, logits: torch.Tensor, row: int, ahead: int) -> list[int]:
        rows = logits[row : row + 1 + len(work.drafts)].clone()
        return self._sampler.sample(rows, [work])[0][:ahead]


def request(seed: int, length: int = 90) -> tuple[list[int], SamplingParams]:
    dice = random.Random(seed)
    # A little vocabulary, so that prompt lookup finds something.
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
    """Collects (lab, sequence) pairs, and holds each to the answer that the request gets alone."""
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


def test_in_a_batch_of_sixteen(model: Mistral, seed: int) -> None:
    with same_as_alone(model, seed) as (prompt, params, others):
        lab = Lab(model)
        for i in range(7):
            lab.add(*request(seed + 1 + i, length=5 + 11 * i))
        others.append((lab, lab.add(prompt, params)))
        for i in range(8):
            lab.add(*request(seed + 20 + i, length=5 + 11 * i))
        lab.drain()


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_with_other_chunk_sizes(model: Mistral, seed: int, chunk: int) -> None:
    with same_as_alone(model, seed) as (prompt, params, others):
        lab = Lab(model, prefill_tokens=chunk, block_size=16 if chunk % 2 else 32)
        others.append((lab, lab.add(prompt, params)))
        lab.drain()


def test_after_pauses(model: Mistral, seed: int) -> None:
    with same_as_alone(model, seed, length=12) as (prompt, params, others):
        lab = Lab(model, blocks=14, block_size=8, prefill_tokens=48)  # each begins with 2 blocks and ends with 7
        for i in range(4):
            lab.add(*request(seed + 1 + i, length=12))
        others.append((lab, lab.add(prompt, params)))
        lab.drain()
        assert lab.scheduler.counters.pauses > 0


def test_with_a_cached_prompt(model: Mistral, seed: int) -> None:
    with same_as_alone(model, seed) as (prompt, params, others):
        lab = Lab(model)
        lab.add([*prompt[:70], 5, 5, 5], params)
        lab.drain()
        for _ in range(2):
            others.append((lab, lab.add(prompt, params)))
            lab.drain()
        assert [other.cached for _, other in others] == [64, 80]


def test_with_guesses(model: Mistral, seed: int) -> None:
    with same_as_alone(model, seed) as (prompt, params, others):
        for rows in (4, 16):
            lab = Lab(model, speculative_rows=rows)
            others.append((lab, lab.add(prompt, params)))
            lab.drain()


def test_guesses_change_no_answer(model: Mistral, seed: int) -> None:
    """Over many prompts at once, greedy and sampled: plain decoding and guessing agree, and some guesses were right."""
    plain, guessing = Lab(model), Lab(model, speculative_rows=64)
    pairs = []
    for i in range(24):
        prompt, params = request(seed + i, length=12 + i)
        prompt = prompt * 2
        pairs.append((plain.add(prompt, params), guessing.add(prompt, params)))
    plain.drain()
    guessing.drain()
    assert [a.tokens for a, _ in pairs] == [b.tokens for _, b in pairs], f"seed {seed}"
    assert guessing.scheduler.counters.proposed > 0


def test_the_next_turn_over_generated_tokens(model: Mistral, seed: int) -> None:
    """A cached prefix that holds an answer: exact unless prompts and answers are rounded differently."""
    prompt, params = request(seed)
    lab = Lab(model)
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
        assert torch.equal(lab.logits[second.arrival, len(turn)], fresh.logits[again.arrival, len(turn)])


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
        scheduler.complete(plan, runner.run(plan))
    assert other.tokens == sequence.tokens
