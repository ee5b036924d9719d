"""The GPU's runner, on emulated kernels: it draws the same tokens as the plain runner.

Capturing a graph needs a GPU; without one, the padded steps that it would hold are computed over the same memory.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from starling.engine.cache import BlockCache
from starling.engine.frame import Frame
from starling.engine.graph_runner import Decodes, GraphRunner, InFlight
from starling.engine.inputs import StepInputs
from starling.engine.runner import Runner, Step, StepRunner
from starling.engine.scheduler import Limits, Scheduler, Work
from starling.engine.sequence import SamplingParams, Sequence
from starling.engine.speculation import MAX_DRAFT, PromptLookup
from starling.model.batch import Batch
from starling.model.mistral import Mistral
from starling.model.ops.cuda import CudaOps
from starling.model.ops.cuda.attention import FEW_TOKENS
from tests.cuda.emulator import EmulatedStream, emulated_ops
from tests.engine.fake_model import Loop
from tests.model.tiny import write_checkpoint

WINDOW, BLOCKS, BLOCK, VOCABULARY = 40, 64, 16, 67
PROMPT = 5  # tokens, where drafts are foreseen


class Alternating:
    """A grammar: odd and even ids in turn, and only the end after two, which is below min_tokens."""

    def __init__(self) -> None:
        self.count = 0
        self.fault: str | None = None

    def mask(self) -> np.ndarray:
        words = np.zeros(-(-VOCABULARY // 32), dtype=np.int32)
        for token in [2] if self.count >= 2 else range(3 + self.count % 2, VOCABULARY, 2):
            words[token // 32] |= np.int32(np.uint32(1 << token % 32).astype(np.int32))
        return words

    def advance(self, token: int) -> None:
        assert self.count < 2 and token % 2 == (3 + self.count) % 2
        self.count += 1


class Foreseeing(PromptLookup):
    """Drafts what an answer will be, and now and then something else."""

    def __init__(self, answer: list[int]) -> None:
        super().__init__()
        self._answer = answer

    def draft(self, tokens: list[int], limit: int) -> list[int]:
        coming = self._answer[len(tokens) - PROMPT : len(tokens) - PROMPT + max(0, limit)]
        return [token if random.random() < 0.8 else 3 for token in coming]


STREAM = EmulatedStream()
DEVICES: list[object] = [
    pytest.param(lambda: emulated_ops(STREAM), id="emulated"),
    pytest.param(CudaOps.on_gpu, id="gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=DEVICES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mistral:
    folder: Path = tmp_path_factory.mktemp("tiny")
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    write_checkpoint(
        folder, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1,
        sliding_window=WINDOW, vocab_size=VOCABULARY, max_position_embeddings=256,
    )  # fmt: skip
    make: Callable[[], CudaOps] = request.param
    return Mistral.load(folder, make())


class EarlyRunner(GraphRunner):
    """Its kernels begin before the previous ones have run, as they may from sm_90 on."""

    def _receive(self, plan: list[Work], rows: int) -> InFlight:
        STREAM.synchronize()
        return super()._receive(plan, rows)


class PlainRunner:
    """The plain runner instead of the graph runner: it waits for every step."""

    def __init__(self, model: Mistral, books: BlockCache) -> None:
        self._inner = Runner(model, model.allocate_cache(BLOCKS, BLOCK), books)
        self.start = self._inner.start
        self.overlaps = self.device_counts = False


def sequences(seed: int, count: int, speculative: bool) -> list[Sequence]:
    """Of every kind: greedy and sampled, penalised, with min_tokens, under a grammar, repetitive."""
    dice = random.Random(seed)
    found = []
    for arrival in range(count):
        prompt = [dice.randrange(3, 9) for _ in range(dice.randint(1, 50))]
        penalized = dice.random() < 0.5
        params = SamplingParams(
            max_tokens=dice.randint(1, 12),
            stop_ids=frozenset({2, 5, 31, 63}),
            seed=dice.randrange(2**32),
            min_tokens=dice.choice([0, 4]),
            temperature=dice.choice([0.0, 0.9]),
            top_p=dice.choice([1.0, 0.8]),
            top_k=dice.choice([0, 20]),
            repetition_penalty=1.3 if penalized else 1.0,
            frequency_penalty=0.4 if penalized else 0.0,
            presence_penalty=dice.choice([0.0, 0.5]) if penalized else 0.0,
        )
        constraint = Alternating() if dice.random() < 0.2 else None
        lookup = PromptLookup() if speculative else None
        found.append(Sequence(arrival, prompt, params, constraint, lookup))  # type: ignore[arg-type]
    return found


def answers(
    model: Mistral, make: Callable[[Mistral, BlockCache, Limits], StepRunner], asked: list[Sequence], **limits: int
) -> list[list[int]]:
    chosen = Limits(**{"max_running": 8, "prefill_tokens": 24, "speculative_rows": 0, **limits})
    books = BlockCache(BLOCKS, BLOCK, chosen.max_running, 256, WINDOW)
    runner = make(model, books, chosen)
    scheduler = Scheduler(books, chosen, runner.device_counts)
    loop = Loop(scheduler, runner)
    for sequence in asked:
        scheduler.add(sequence)
    while not loop.idle:
        loop.step()
        books.check(scheduler.running)
    return [sequence.tokens[sequence.prompt_length :] for sequence in asked]


def arriving(
    model: Mistral,
    make: Callable[[Mistral, BlockCache, Limits], StepRunner],
    asked: list[Sequence],
    dice: random.Random,
) -> list[list[int]]:
    """Like `answers`, but requests arrive a few at a time, so that steps grow and shrink and grow again."""
    limits = Limits(max_running=8, prefill_tokens=24, speculative_rows=0)
    books = BlockCache(BLOCKS, BLOCK, limits.max_running, 256, WINDOW)
    runner = make(model, books, limits)
    scheduler = Scheduler(books, limits, runner.device_counts)
    loop, waiting = Loop(scheduler, runner), list(asked)
    while waiting or not loop.idle:
        for _ in range(dice.choice([0, 0, 0, 0, 0, 5]) if not loop.idle else 1):
            if waiting:
                scheduler.add(waiting.pop())
        loop.step()
    return [sequence.tokens[sequence.prompt_length :] for sequence in asked]


def plain(model: Mistral, books: BlockCache, limits: Limits) -> StepRunner:
    return PlainRunner(model if model.ops.device.type == "cuda" else replace(model, ops=emulated_ops()), books)


def graphs(model: Mistral, books: BlockCache, limits: Limits) -> StepRunner:
    return EarlyRunner(model, model.allocate_cache(BLOCKS, BLOCK), books, limits)


@pytest.mark.parametrize("speculative_rows", [0, 8])
def test_answers_are_those_of_the_plain_runner(model: Mistral, speculative_rows: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    made = answers(model, graphs, sequences(seed, 7, speculative_rows > 0), speculative_rows=speculative_rows)
    wanted = [
        answers(model, plain, [sequence])[0] for sequence in sequences(seed, 7, speculative=False)
    ]  # each alone, and without drafts
    assert made == wanted


@pytest.mark.parametrize("max_running", [1, 3])
def test_drafts_are_verified_in_the_steps_that_graphs_hold(
    model: Mistral, max_running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched kernel by kernel, such a step takes an H100 longer than its few more tokens are worth."""
    with_drafts, other = [], []
    start, frame_for = GraphRunner.start, GraphRunner._frame_for

    def recording_start(runner: GraphRunner, plan: list[Work]) -> Step:
        with_drafts.extend(work for work in plan if work.drafts)
        return start(runner, plan)

    def recording_frame_for(runner: GraphRunner, inputs: StepInputs) -> Frame:
        other.append(inputs)
        return frame_for(runner, inputs)

    monkeypatch.setattr(GraphRunner, "start", recording_start)
    monkeypatch.setattr(GraphRunner, "_frame_for", recording_frame_for)

    def asked(lookups: Iterable[PromptLookup | None]) -> list[Sequence]:
        params = SamplingParams(max_tokens=12, stop_ids=frozenset(), seed=0)
        return [Sequence(i, [3 + i] * PROMPT, params, lookup=lookup) for i, lookup in enumerate(lookups)]

    wanted = [answers(model, plain, [sequence])[0] for sequence in asked([None] * 3)]
    made = answers(model, graphs, asked(map(Foreseeing, wanted)), max_running=max_running, speculative_rows=MAX_DRAFT)
    assert made == wanted
    assert with_drafts and max(len(work.drafts) for work in with_drafts) + 1 <= FEW_TOKENS
    assert all(len(inputs.token_ids) > len(inputs.logit_rows) for inputs in other), "only prompts"


class Hopeful(PromptLookup):
    """Drafts as much as it may, right or wrong."""

    def draft(self, tokens: list[int], limit: int) -> list[int]:
        return [3] * max(0, min(MAX_DRAFT, limit))


def test_a_step_may_be_larger_than_any_graph(model: Mistral, monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts in every row of a graph, and a new request whose prompt is cached but for its last token."""
    limits = Limits(max_running=4, prefill_tokens=24, speculative_rows=8)
    books = BlockCache(BLOCKS, BLOCK, limits.max_running, 256, WINDOW)
    scheduler = Scheduler(books, limits, device_counts=True)
    loop = Loop(scheduler, graphs(model, books, limits))
    sizes = []
    frame_for = GraphRunner._frame_for

    def recording_frame_for(runner: GraphRunner, inputs: StepInputs) -> Frame:
        sizes.append((len(inputs.token_ids), len(inputs.logit_rows)))
        return frame_for(runner, inputs)

    monkeypatch.setattr(GraphRunner, "_frame_for", recording_frame_for)

    def asked(arrival: int) -> Sequence:
        params = SamplingParams(max_tokens=12, stop_ids=frozenset(), seed=arrival)
        return Sequence(arrival, [5, 6, 7, 8] * (BLOCK // 4) + [5], params, lookup=Hopeful())

    made = [asked(arrival) for arrival in range(2)]
    scheduler.add(made[0])
    while len(made[0].tokens) < BLOCK + 4:
        loop.step()
    scheduler.add(made[1])
    while not loop.idle:
        loop.step()
    assert (limits.speculative_rows + 1,) * 2 in sizes
    for sequence in made:
        assert [sequence.tokens[BLOCK + 1 :]] == answers(model, plain, [asked(sequence.arrival)])


@pytest.mark.parametrize("make", [plain, graphs])
def test_non_finite_logits_end_their_own_request(
    model: Mistral, make: Callable[[Mistral, BlockCache, Limits], StepRunner]
) -> None:
    embedding = model.embedding.clone()
    embedding[9] = torch.inf
    broken = replace(model, embedding=embedding)

    def asked() -> list[Sequence]:
        params = SamplingParams(max_tokens=4, stop_ids=frozenset({2}), seed=0)
        return [Sequence(i, prompt, params) for i, prompt in enumerate(([3, 4, 5], [6, 9, 7], [8, 3] * 9))]

    made = answers(broken, make, asked())
    assert made[0] and made[1] == [] and made[2]
    assert made == [answers(broken, make, [sequence])[0] for sequence in asked()]


ON_GPU = pytest.mark.parametrize(
    "model", [pytest.param(CudaOps.on_gpu, id="gpu", marks=pytest.mark.gpu)], indirect=True
)


@ON_GPU
def test_graphs_of_one_pool_replay_in_any_order(model: Mistral) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    made = arriving(model, graphs, sequences(seed, 60, False), random.Random(seed))
    assert made == [answers(model, plain, [sequence])[0] for sequence in sequences(seed, 60, False)]


class FailingCapture(GraphRunner):
    """Steps of 2 and 8 decodes cannot be captured: `fault` is called in the middle of each."""

    fault: Callable[[], object]

    def _compute(self, frame: Frame, batch: Batch) -> None:
        super()._compute(frame, batch)
        if torch.cuda.is_current_stream_capturing() and frame.shape.works in (2, 8):
            self.fault()


@ON_GPU
@pytest.mark.parametrize("fault", [lambda: 1 / 0, torch.cuda.synchronize], ids=["raises", "breaks the capture"])
def test_a_capture_that_fails_leaves_the_stream_as_it_was(
    model: Mistral, fault: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    runners: list[FailingCapture] = []

    def failing(model: Mistral, books: BlockCache, limits: Limits) -> StepRunner:
        runners.append(FailingCapture(model, model.allocate_cache(BLOCKS, BLOCK), books, limits))
        runners[0].fault = fault
        return runners[0]

    made = arriving(model, failing, sequences(1, 60, False), random.Random(1))
    assert made == [answers(model, plain, [sequence])[0] for sequence in sequences(1, 60, False)]
    captured = {size: decodes.graph is not None for size, decodes in runners[0]._decodes.items()}
    assert captured == {size: size not in (2, 8) for size in captured}
    assert len(caplog.records) == len(captured) - sum(captured.values()) > 0
    assert kept_of_what_another_stream_used() == 0


def kept_of_what_another_stream_used() -> int:
    """Bytes that torch does not reuse, as during a capture."""
    stream = torch.cuda.Stream()
    held = []
    for _ in range(3):
        torch.empty(32 << 20, dtype=torch.uint8, device="cuda").record_stream(stream)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_reserved())
    return held[-1] - held[0]


def test_a_step_that_cannot_be_captured_is_computed_all_the_same(
    model: Mistral, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(runner: GraphRunner, decodes: Decodes) -> None:
        raise torch.OutOfMemoryError(f"no room for {decodes.frame.shape.works}")

    monkeypatch.setattr(GraphRunner, "_capture", refuse)
    captures = GraphRunner._try_to_capture

    def on_a_gpu(runner: GraphRunner, decodes: Decodes) -> None:
        cuda, runner._cuda = runner._cuda, True
        captures(runner, decodes)
        runner._cuda = cuda

    monkeypatch.setattr(GraphRunner, "_try_to_capture", on_a_gpu)
    made = answers(model, graphs, sequences(2, 5, False))
    assert made == [answers(model, plain, [sequence])[0] for sequence in sequences(2, 5, False)]
    sizes = [record.getMessage().split()[2] for record in caplog.records]
    assert sizes and len(sizes) == len(set(sizes)), "once for each size"
