"""The loop with a model of a few lines: delivery, cancelling at any stage, faults, and shutdown."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest

from starling.engine.cache import BlockCache
from starling.engine.engine import Delivery, Engine, TokenStream
from starling.engine.inputs import StepInputs
from starling.engine.runner import Step
from starling.engine.scheduler import NO_TOKEN, Limits, Scheduler, Work
from starling.engine.sequence import SamplingParams
from starling.errors import DeviceError, EngineError, EngineStoppedError, RequestError
from tests.engine.fake_model import FakeRunner, Rhythm, Rule, expected_answer
from tests.waiting import HANG_S, wait_for

CONTEXT = 128


class Gated(FakeRunner):
    """Computes a step once the gate lets it through."""

    def __init__(self, books: BlockCache, overlaps: bool) -> None:
        super().__init__(books, overlaps)
        self.gate = threading.Semaphore(0)
        self.started = 0
        self.steps = 0

    def start(self, plan: list[Work]) -> Step:
        self.started += 1
        return super().start(plan)

    def compute(self, *inputs: Any) -> list[int]:
        self.gate.acquire()
        self.steps += 1
        return super().compute(*inputs)


class Failing(FakeRunner):
    """Fails the step that computes a prompt token of value 6: while it is computed or, `at_start`, as it starts."""

    at_start = False

    def start(self, plan: list[Work]) -> Step:
        if self.at_start and any(6 in w.sequence.tokens[w.start : w.sequence.prompt_length] for w in plan):
            raise ArithmeticError("six")
        return super().start(plan)

    def compute(self, inputs: StepInputs, rules: dict[int, Rule]) -> list[int]:
        if 6 in inputs.token_ids[inputs.prompt_tokens]:
            self._sampled = [0] * len(inputs.logit_rows)
            raise ArithmeticError("six")
        return super().compute(inputs, rules)


class FailingAtStart(Failing):
    at_start = True


@pytest.fixture(params=[False, True], ids=["in turn", "overlapped"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


RunnerType = TypeVar("RunnerType", bound=FakeRunner)


@contextmanager
def running(
    runner_type: type[RunnerType], overlaps: bool, blocks: int = 64, max_running: int = 4, hang_after_s: float = 60
) -> Iterator[tuple[Engine, RunnerType]]:
    books = BlockCache(blocks, 4, max_running, CONTEXT)
    runner = runner_type(books, overlaps)
    engine = Engine(
        Scheduler(books, Limits(max_running, prefill_tokens=16, speculative_rows=16)),
        runner,
        CONTEXT,
        vocab_size=7,
        hang_after_s=hang_after_s,
    )
    try:
        yield engine, runner
    finally:
        if isinstance(runner, Gated):
            runner.gate.release(10000)
        engine.close()
        engine._thread.join()  # close waits no longer than a step may hang, which is next to nothing in some tests
        assert not engine._streams
        if engine._idle:
            books.check([])


def params(max_tokens: int = 10, stops: bool = True) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, stop_ids=frozenset({0} if stops else ()), seed=0)


def drain(stream: TokenStream) -> tuple[list[int], Delivery]:
    tokens: list[int] = []
    while True:
        delivery = stream.get(HANG_S)
        assert delivery is not None
        tokens += delivery.tokens
        if delivery.finish:
            return tokens, delivery


def test_many_at_once_each_get_their_own_answer(overlaps: bool) -> None:
    prompts = [[i % 7, 1 + i % 5, 2] * (1 + i % 4) for i in range(40)]
    with running(FakeRunner, overlaps, blocks=20) as (engine, _):
        streams = [engine.submit(prompt, params(12)) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            assert drain(stream)[0] == expected_answer(prompt, 12, frozenset({0}))


def test_every_delivery_says_how_much_of_the_prompt_was_cached(overlaps: bool) -> None:
    with running(FakeRunner, overlaps) as (engine, _):
        for cached in (0, 8):  # a block holds 4, and the last token is always computed
            stream = engine.submit([1, 2, 3, 4, 5, 6, 1, 2, 3], params(6, stops=False))
            finish = None
            while finish is None:
                delivery = stream.get(HANG_S)
                assert delivery is not None and delivery.cached_tokens == cached
                finish = delivery.finish


@pytest.mark.parametrize("stage", ["queued", "prefilling", "decoding"])
def test_cancel_ends_a_request_within_one_step(stage: str, overlaps: bool) -> None:
    with running(Gated, overlaps, max_running=1) as (engine, runner):
        first = engine.submit([1] * (60 if stage == "prefilling" else 3), params(60, stops=False))
        second = engine.submit([2, 3], params(60, stops=False))
        runner.gate.release(1 if stage == "prefilling" else 3)
        victim, other = (second, first) if stage == "queued" else (first, second)
        wait_for(lambda: runner.steps >= (1 if stage == "prefilling" else 3))
        victim.cancel()
        victim.cancel()
        runner.gate.release(1000)
        assert drain(victim)[1].finish == "cancelled"
        assert drain(other)[1].finish in ("stop", "length")


@pytest.mark.parametrize("kind", [Failing, FailingAtStart])
def test_a_failing_step_ends_its_own_requests_and_no_other(kind: type[Failing], overlaps: bool) -> None:
    with running(kind, overlaps) as (engine, _):
        with pytest.raises(EngineError, match="ArithmeticError"):
            raise drain(engine.submit([1, 6], params()))[1].error or AssertionError("no error")
        assert drain(engine.submit([1, 2], params()))[0] == expected_answer([1, 2], 10, frozenset({0}))
        assert engine.healthy


class Undrawable(FakeRunner):
    """Has nothing to draw from after a prompt that ends with 6."""

    def compute(self, inputs: StepInputs, rules: dict[int, Rule]) -> list[int]:
        drawn = super().compute(inputs, rules)
        broken = (inputs.token_ids == 6) & inputs.prompt_tokens
        return [NO_TOKEN if broken[at] else token for at, token in zip(inputs.logit_rows, drawn, strict=True)]


def test_non_finite_logits_end_their_own_request(overlaps: bool) -> None:
    with running(Undrawable, overlaps) as (engine, _):
        streams = [engine.submit(prompt, params()) for prompt in ([1, 2], [1, 6], [2, 3])]
        ends = [drain(stream) for stream in streams]
        assert [tokens for tokens, _ in ends] == [
            expected_answer([1, 2], 10, frozenset({0})), [], expected_answer([2, 3], 10, frozenset({0}))
        ]  # fmt: skip
        with pytest.raises(EngineError, match="no finite number"):
            raise ends[1][1].error or AssertionError("no error")
        assert engine.healthy


class Breaking(Rhythm):
    """After three tokens it allows only the end, or fails: in `advance` for the third, or in the next `mask`."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self._by = by

    def advance(self, token: int) -> None:
        super().advance(token)
        if self.count == 3 and self._by == "advance":
            self.fault = "too large"

    def mask(self) -> np.ndarray:
        if self.count < 3 or self._by == "advance":
            return super().mask() & ~1
        self.fault = "too large" if self._by == "mask" else None
        return np.array([1], dtype=np.int32)


@pytest.mark.parametrize("min_tokens", [0, 9])
@pytest.mark.parametrize("by", ["advance", "mask", "end"])
def test_a_grammar_that_breaks_ends_its_own_request(by: str, min_tokens: int, overlaps: bool) -> None:
    with running(FakeRunner, overlaps) as (engine, _):
        asked = replace(params(60), min_tokens=min_tokens)
        stream = engine.submit([1, 2], asked, Breaking(by))
        other = engine.submit([1, 2, 3], params(20))
        tokens, delivery = drain(stream)
        if by == "end":  # a grammar that allows only the end is no fault, and min_tokens cannot hold it back
            assert (delivery.finish, len(tokens), tokens[-1]) == ("stop", 4, 0)
        else:
            assert isinstance(delivery.error, RequestError) and "too large" in str(delivery.error)
        assert drain(other)[0] == expected_answer([1, 2, 3], 20, frozenset({0}))
        assert engine.occupancy["running"] == 0, "it does not run on to its 60 tokens"


class FailsWithOneInFlight(Gated):
    """The third step fails; by then the fourth has been started."""

    def compute(self, *inputs: Any) -> list[int]:
        sampled = super().compute(*inputs)
        if self.steps == 3:
            raise ArithmeticError("three")
        return sampled


def test_a_step_built_on_one_that_fails_serves_the_others() -> None:
    with running(FailsWithOneInFlight, overlaps=True) as (engine, runner):
        first = engine.submit([1, 2], params(20, stops=False))
        runner.gate.release(1)
        wait_for(lambda: runner.steps >= 1)
        # The second and third steps hold the first request alone; the third is started before the second is let
        # through, and this request arrives before the fourth is planned.
        second = engine.submit([3, 4], params(20, stops=False))
        runner.gate.release(1000)
        tokens, delivery = drain(first)
        assert isinstance(delivery.error, EngineError) and "ArithmeticError" in str(delivery.error)
        assert tokens == expected_answer([1, 2], 20, frozenset())[: len(tokens)]
        tokens, delivery = drain(second)
        assert (delivery.finish, tokens) == ("length", expected_answer([3, 4], 20, frozenset()))


class FailsAtFourthStart(FakeRunner):
    starts = 0

    def start(self, plan: list[Work]) -> Step:
        self.starts += 1
        if self.starts == 4:
            raise ArithmeticError("four")
        return super().start(plan)


def test_a_request_that_ends_in_the_step_before_a_failed_one_ends_well() -> None:
    """The fourth step is started before it is known that the third ended the request."""
    pairs = [[a, b] for a in range(7) for b in range(7)]
    prompt = next(pair for pair in pairs if len(expected_answer(pair, 20, frozenset({0}))) == 3)
    with running(FailsAtFourthStart, overlaps=True) as (engine, runner):
        tokens, delivery = drain(engine.submit(prompt, params(20)))
        assert (delivery.finish, tokens) == ("stop", expected_answer(prompt, 20, frozenset({0})))
        assert runner.starts == 4 and engine.healthy


def test_tokens_come_while_the_next_step_is_in_flight() -> None:
    with running(Gated, overlaps=True) as (engine, runner):
        stream = engine.submit([1, 2], params(20, stops=False))
        runner.gate.release(1)
        delivery = stream.get()
        assert delivery is not None and len(delivery.tokens) == 1
        assert runner.steps == 1 and runner.started > 1


def test_tokens_of_a_step_that_is_computed_as_it_starts_come_before_the_next() -> None:
    with running(Gated, overlaps=False) as (engine, runner):
        stream = engine.submit([1, 2], params(20, stops=False))
        for steps in (1, 2):
            runner.gate.release(1)
            delivery = stream.get(HANG_S)
            assert delivery is not None and len(delivery.tokens) == 1
            assert runner.steps == steps


def test_a_text_that_repeats_is_drafted(overlaps: bool) -> None:
    start = [1, 2, 3, 4, 5]
    prompt = [*start, *expected_answer(start, 12, frozenset()), *start]
    with running(FakeRunner, overlaps) as (engine, _):
        assert drain(engine.submit(prompt, params(16, stops=False)))[0] == expected_answer(prompt, 16, frozenset())
        assert engine.counters.accepted > 6


def test_occupancy_counts_what_runs_and_what_waits(overlaps: bool) -> None:
    with running(Gated, overlaps, blocks=8, max_running=2) as (engine, runner):
        assert engine.occupancy == {"running": 0, "waiting": 0, "kv_blocks": 8, "kv_blocks_free": 8}
        streams = [engine.submit([token] * 4, params(4, stops=False)) for token in range(3)]
        runner.gate.release(1)  # the first step may hold the first request alone
        wait_for(lambda: len(engine._scheduler.running) == 2 and all(s.blocks for s in engine._scheduler.running))
        held = sum(len(sequence.blocks) for sequence in engine._scheduler.running)
        assert engine.occupancy == {"running": 2, "waiting": 1, "kv_blocks": 8, "kv_blocks_free": 8 - held}
        runner.gate.release(1000)
        for stream in streams:
            drain(stream)


def test_a_lost_device_ends_everything(overlaps: bool) -> None:
    class Lost(FakeRunner):
        def compute(self, inputs: StepInputs, rules: dict[int, Rule]) -> list[int]:
            raise DeviceError("gone")

    with running(Lost, overlaps) as (engine, _):
        stream = engine.submit([1, 2], params())
        assert isinstance(drain(stream)[1].error, EngineStoppedError)
        wait_for(lambda: not engine.healthy)


def test_a_cancelled_request_leaves_no_step_behind() -> None:
    """With no request left, the step in flight is still collected, and the engine does not count as hung."""
    with running(Gated, overlaps=True, hang_after_s=0.05) as (engine, runner):
        stream = engine.submit([1, 2], params(60, stops=False))
        runner.gate.release(3)
        wait_for(lambda: runner.steps == 3)
        stream.cancel()
        runner.gate.release(1)
        assert drain(stream)[1].finish == "cancelled"
        runner.gate.release(1000)
        wait_for(lambda: engine._in_flight is None)
        wait_for(lambda: engine.healthy)
        time.sleep(0.1)  # longer than a step may take
        assert engine.healthy


def test_what_cannot_run_is_refused_with_numbers() -> None:
    with running(FakeRunner, overlaps=False, blocks=8) as (engine, _):
        with pytest.raises(RequestError, match=r"100 tokens long and max_tokens is 29, 129 together.*128.*28 or less"):
            engine.submit([1] * 100, params(29))
        with pytest.raises(RequestError, match=r"200 tokens long.*Shorten the prompt to 125 tokens or fewer\.$"):
            engine.submit([1] * 200, params(3))
        with pytest.raises(RequestError, match=r"Shorten the prompt to 127 tokens or fewer, and lower max_tokens"):
            engine.submit([1] * 200, params(128))
        with pytest.raises(RequestError, match=r"Lower max_tokens to 1\.$"):
            engine.submit([1] * 127, params(2))
        with pytest.raises(RequestError, match=r"40 together; .*KV_CACHE_BYTES\) holds 32\. .* to 2 or less"):
            engine.submit([1] * 30, params(10))
        with pytest.raises(RequestError, match=r"KV cache .* holds 32\. Shorten the prompt"):
            engine.submit([1] * 32, params(1))
        with pytest.raises(RequestError, match="token id 7"):
            engine.submit([1, 7], params())
        with pytest.raises(RequestError, match="token id -1"):
            engine.submit([1, -1], params())
        with pytest.raises(RequestError, match="no tokens"):
            engine.submit([], params())


@pytest.mark.parametrize("length", [1, 100, CONTEXT - 1])
def test_the_context_can_be_filled_to_its_last_token(length: int, overlaps: bool) -> None:
    with running(FakeRunner, overlaps) as (engine, _):
        prompt = [1, 2, 3, 4, 5] * 30
        tokens, delivery = drain(engine.submit(prompt[:length], params(CONTEXT - length, stops=False)))
        assert delivery.finish == "length"
        assert tokens == expected_answer(prompt[:length], CONTEXT - length, frozenset())


def test_a_closed_engine_ends_what_runs_and_refuses_the_rest(overlaps: bool) -> None:
    with running(Gated, overlaps) as (engine, runner):
        first = engine.submit([1, 2], params())
        wait_for(lambda: runner.started)
        closer = threading.Thread(target=engine.close)
        closer.start()
        wait_for(lambda: not engine._inbox.empty())
        second = engine.submit([1, 2], params())  # behind the command to stop
        runner.gate.release(1000)
        closer.join()
        for stream in (first, second):
            delivery = drain(stream)[1]
            assert delivery.finish == "error" and isinstance(delivery.error, EngineStoppedError)
        assert not engine.healthy
        assert runner.steps == runner.started  # the device has nothing left to do
        with pytest.raises(EngineStoppedError):
            engine.submit([1], params())


class SlowInbox:
    """An engine's inbox that takes a request as late as possible: once the engine's thread is gone, or is waiting."""

    def __init__(self, engine: Engine) -> None:
        self._inbox = engine._inbox
        self._thread = engine._thread
        self.entered = threading.Event()

    def put(self, command: Any) -> None:
        if command.kind == "submit":
            self.entered.set()
            self._thread.join(0.2)
        self._inbox.put(command)

    def get(self) -> Any:
        return self._inbox.get()

    def empty(self) -> bool:
        return self._inbox.empty()


def test_a_request_that_comes_as_the_engine_ends_is_answered(overlaps: bool) -> None:
    with running(Gated, overlaps) as (engine, runner), ThreadPoolExecutor() as pool:
        engine.submit([1, 2], params())
        wait_for(lambda: runner.started)
        engine._inbox = inbox = SlowInbox(engine)  # type: ignore[assignment]
        closing = pool.submit(engine.close)
        wait_for(lambda: not inbox.empty())
        late = pool.submit(engine.submit, [1, 2], params())
        inbox.entered.wait()  # it has found the engine open
        runner.gate.release(1000)
        closing.result()
        delivery = late.result().get(0)
        assert delivery is not None and isinstance(delivery.error, EngineStoppedError)


def test_a_step_that_hangs_is_unhealthy_until_it_ends(overlaps: bool) -> None:
    with running(Gated, overlaps, hang_after_s=0.05) as (engine, runner):
        assert engine.healthy
        stream = engine.submit([1, 2], params())
        wait_for(lambda: not engine.healthy)
        with pytest.raises(EngineStoppedError, match="hangs"):
            engine.submit([1, 2], params())
        runner.gate.release(1000)
        drain(stream)
        wait_for(lambda: engine.healthy)


def test_broken_bookkeeping_ends_everything(overlaps: bool) -> None:
    class Breaks(Gated):
        def compute(self, *inputs: Any) -> list[int]:
            super().compute(*inputs)
            self._books._ref_counts = [0] * self._books.blocks  # so that no block can be released
            raise ArithmeticError("broken")

    with running(Breaks, overlaps) as (engine, runner):
        streams = [engine.submit([1, 2], params()) for _ in range(5)]  # four run, one waits
        runner.gate.release(1000)
        for stream in streams:
            assert isinstance(drain(stream)[1].error, EngineStoppedError)
        wait_for(lambda: not engine.healthy)


def test_a_dead_thread_ends_everything(overlaps: bool) -> None:
    class Exits(FakeRunner):
        def compute(self, inputs: StepInputs, rules: dict[int, Rule]) -> list[int]:
            raise SystemExit

    with running(Exits, overlaps, hang_after_s=0) as (engine, _):
        stream = engine.submit([1, 2], params())
        assert isinstance(drain(stream)[1].error, EngineStoppedError)
        wait_for(lambda: not engine.healthy)
        with pytest.raises(EngineStoppedError, match="has stopped"):  # not that it hangs in the step that it died in
            engine.submit([1], params())
