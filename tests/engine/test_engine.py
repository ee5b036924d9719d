"""The loop with a model of a few lines: delivery, cancelling at any stage, faults, and the end of the engine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from starling.engine.cache import BlockCache
from starling.engine.engine import Delivery, Engine, TokenStream
from starling.engine.runner import StepRunner
from starling.engine.scheduler import Limits, Scheduler, Work
from starling.engine.sequence import SamplingParams
from starling.errors import EngineError, EngineStoppedError, RequestError
from tests.engine.fake_model import FakeRunner, expected_answer

CONTEXT = 128


class Gated(FakeRunner):
    """Waits before each step until it is let through."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.steps = 0

    def run(self, plan: list[Work]) -> list[list[int]]:
        self.gate.acquire()
        self.steps += 1
        return super().run(plan)


class Failing(FakeRunner):
    """Fails the step in which a token of value 6 is computed as part of a prompt."""

    def run(self, plan: list[Work]) -> list[list[int]]:
        if any(6 in w.sequence.tokens[w.start : w.sequence.prompt_length] for w in plan):
            raise ArithmeticError("six")
        return super().run(plan)


@contextmanager
def running(runner: StepRunner, blocks: int = 64, max_running: int = 4, hang_after_s: float = 60) -> Iterator[Engine]:
    books = BlockCache(blocks, 4, max_running, CONTEXT)
    engine = Engine(
        Scheduler(books, Limits(max_running, prefill_tokens=16)),
        runner,
        CONTEXT,
        vocab_size=7,
        hang_after_s=hang_after_s,
    )
    try:
        yield engine
    finally:
        engine.close()
        assert books.available == books.blocks


def params(max_tokens: int = 10, stops: bool = True) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, stop_ids=frozenset({0} if stops else ()), seed=0)


def drain(stream: TokenStream) -> tuple[list[int], Delivery]:
    tokens: list[int] = []
    while True:
        delivery = stream.get()
        assert delivery is not None
        tokens += delivery.tokens
        if delivery.finish:
            return tokens, delivery


def test_many_at_once_each_get_their_own_answer() -> None:
    prompts = [[i % 7, 1 + i % 5, 2] * (1 + i % 4) for i in range(40)]
    with running(FakeRunner(), blocks=20) as engine:
        streams = [engine.submit(prompt, params(12)) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            assert drain(stream)[0] == expected_answer(prompt, 12, frozenset({0}))


@pytest.mark.parametrize("stage", ["queued", "prefilling", "decoding"])
def test_cancel_ends_a_request_within_one_step(stage: str) -> None:
    runner = Gated()
    with running(runner, max_running=1) as engine:
        first = engine.submit([1] * (60 if stage == "prefilling" else 3), params(60, stops=False))
        second = engine.submit([2, 3], params(60, stops=False))
        runner.gate.release(1 if stage == "prefilling" else 3)
        victim, other = (second, first) if stage == "queued" else (first, second)
        while runner.steps < (1 if stage == "prefilling" else 3):
            pass
        victim.cancel()
        victim.cancel()
        runner.gate.release(1000)
        assert drain(victim)[1].finish == "cancelled"
        assert drain(other)[1].finish in ("stop", "length")


def test_a_failing_step_ends_its_own_requests_and_no_other() -> None:
    with running(Failing()) as engine:
        with pytest.raises(EngineError, match="ArithmeticError"):
            raise drain(engine.submit([1, 6], params()))[1].error or AssertionError("no error")
        assert drain(engine.submit([1, 2], params()))[0] == expected_answer([1, 2], 10, frozenset({0}))
        assert engine.healthy


def test_what_cannot_run_is_refused_with_numbers() -> None:
    with running(FakeRunner(), blocks=8) as engine:
        with pytest.raises(RequestError, match=r"100 tokens long and max_tokens is 29, 129 together.*128.*28 or less"):
            engine.submit([1] * 100, params(29))
        with pytest.raises(RequestError, match=r"200 tokens long.*Shorten the prompt"):
            engine.submit([1] * 200, params(1))
        with pytest.raises(RequestError, match=r"KV cache holds 32 tokens"):
            engine.submit([1] * 30, params(10))
        with pytest.raises(RequestError, match="token id 7"):
            engine.submit([1, 7], params())
        with pytest.raises(RequestError, match="no tokens"):
            engine.submit([], params())


def test_a_closed_engine_ends_what_runs_and_refuses_the_rest() -> None:
    runner = Gated()
    with running(runner) as engine:
        stream = engine.submit([1, 2], params())
        closer = threading.Thread(target=engine.close)
        closer.start()
        runner.gate.release(1000)
        closer.join()
        delivery = drain(stream)[1]
        assert delivery.finish == "error" and isinstance(delivery.error, EngineStoppedError)
        assert not engine.healthy
        with pytest.raises(EngineStoppedError):
            engine.submit([1], params())


def test_a_step_that_hangs_is_unhealthy_until_it_ends() -> None:
    runner = Gated()
    with running(runner, hang_after_s=0.05) as engine:
        assert engine.healthy
        stream = engine.submit([1, 2], params())
        while engine.healthy:
            pass
        runner.gate.release(1000)
        drain(stream)
        while not engine.healthy:
            pass


def test_a_dead_thread_ends_everything() -> None:
    class Exits(FakeRunner):
        def run(self, plan: list[Work]) -> list[list[int]]:
            raise SystemExit

    with running(Exits()) as engine:
        stream = engine.submit([1, 2], params())
        assert isinstance(drain(stream)[1].error, EngineStoppedError)
        while engine.healthy:
            pass
        with pytest.raises(EngineStoppedError):
            engine.submit([1], params())
