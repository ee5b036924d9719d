"""Cancellation reaches the generation whenever it comes, on a real event loop used as coglet uses one."""

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextvars import ContextVar, copy_context
from pathlib import Path

import pytest
from cog import CancelationException

from starling import coglet
from starling.coglet import CancelSignal, current_signal, drain, install_cancellation
from starling.errors import EngineError, EngineStoppedError, GenerationCancelled, RequestError


class Counting:
    """0 1 2 … for ever, until it is cancelled; raises `fault` after 2."""

    def __init__(self, fault: Exception | None = None, length: int = 10**9) -> None:
        self.cancelled = threading.Event()
        self.closed = 0
        self._fault = fault
        self._length = length

    def __iter__(self) -> Iterator[str]:
        for number in range(self._length):
            if self.cancelled.is_set():
                raise GenerationCancelled
            if number == 2 and self._fault:
                raise self._fault
            yield str(number)

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on a thread of its own, with cancellation installed meanwhile."""
    original = asyncio.run_coroutine_threadsafe
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    install_cancellation()
    install_cancellation()
    yield loop
    asyncio.run_coroutine_threadsafe = original
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def nothing(_: Counting) -> None:
    pass


def test_cancelling_a_future_that_is_done_stops_its_generator(loop: asyncio.AbstractEventLoop) -> None:
    counting = Counting()

    async def predict() -> Iterator[str]:
        return drain(lambda: counting, pytest.fail, current_signal())  # fails if a cancelled answer is recorded

    future = asyncio.run_coroutine_threadsafe(predict(), loop)
    chunks = future.result()
    assert [next(chunks), next(chunks)] == ["0", "1"]
    assert not future.cancel()  # done already: asyncio alone would do nothing
    with pytest.raises(asyncio.CancelledError):
        next(chunks)
    assert counting.closed == 1


def test_nothing_of_a_finished_answer_is_kept_alive(loop: asyncio.AbstractEventLoop) -> None:
    async def predict(counting: Counting) -> Iterator[str]:
        return drain(lambda: counting, nothing, current_signal())

    gc.disable()  # in a server, what only the garbage collector can free lives long
    try:
        counting = Counting(length=3)
        ended = weakref.ref(counting)
        future = asyncio.run_coroutine_threadsafe(predict(counting), loop)
        del counting
        assert list(future.result()) == ["0", "1", "2"]
        loop.call_soon_threadsafe(future.cancel)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
        del future
        assert ended() is None
    finally:
        gc.enable()


def test_each_prediction_has_its_own_signal(loop: asyncio.AbstractEventLoop) -> None:
    async def predict(counting: Counting) -> Iterator[str]:
        await asyncio.sleep(0)
        return drain(lambda: counting, nothing, current_signal())

    generations = [Counting() for _ in range(4)]
    futures = [asyncio.run_coroutine_threadsafe(predict(generation), loop) for generation in generations]
    streams = [future.result() for future in futures]
    for stream in streams:
        next(stream)
    futures[2].cancel()
    assert [generation.cancelled.is_set() for generation in generations] == [False, False, True, False]


def test_cancelling_before_the_generator_is_drained(loop: asyncio.AbstractEventLoop) -> None:
    """The signal has fired by then: the generation is cancelled as soon as it exists."""
    counting = Counting()

    async def predict() -> Iterator[str]:
        return drain(lambda: counting, nothing, current_signal())

    future = asyncio.run_coroutine_threadsafe(predict(), loop)
    chunks = future.result()
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        next(chunks)
    assert counting.closed == 1


def test_a_cancellation_that_hits_before_the_first_chunk_closes() -> None:
    """coglet raises it in the draining thread, at any line."""

    class Struck(CancelSignal):
        def connect(self, action: Callable[[], None]) -> None:
            raise CancelationException

    counting = Counting()
    with pytest.raises(asyncio.CancelledError):
        next(drain(lambda: counting, nothing, Struck()))
    assert counting.closed == 1


def test_coglet_s_cancellation_exception_says_cancelled(loop: asyncio.AbstractEventLoop) -> None:
    """coglet may raise it while waiting for the coroutine, and treats an error there as a cancellation by this word."""
    assert "cancelled" in str(CancelationException())


def test_cancelling_a_coroutine_that_still_runs(loop: asyncio.AbstractEventLoop) -> None:
    running, ended = threading.Event(), threading.Event()

    async def predict() -> None:
        running.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(predict(), loop)
    running.wait()
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    ended.wait()


def test_a_signal_does_not_leak_into_the_next_prediction(loop: asyncio.AbstractEventLoop) -> None:
    """The thread that submits one prediction later serves others."""
    before = copy_context()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
    assert dict(copy_context()) == dict(before)


def test_a_cancellation_that_hits_as_the_future_is_made_cancels_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """coglet raises it in the submitting thread, at any line."""

    class Struck(Future[None]):
        @property
        def cancel(self) -> None:  # type: ignore[override]
            raise CancelationException

    def submit(coroutine: Coroutine[None, None, None], loop: asyncio.AbstractEventLoop) -> Future[None]:
        coroutine.close()
        return Struck()

    async def predict() -> None:
        pass

    monkeypatch.setattr(coglet, "_run_coroutine_threadsafe", submit)
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        assert coglet._submit(predict(), loop).cancelled()


def test_a_cancellation_that_hits_as_the_answer_is_drained_cancels_it() -> None:
    counting = Counting(CancelationException())
    with pytest.raises(asyncio.CancelledError):
        list(drain(lambda: counting, nothing, CancelSignal()))
    assert counting.closed == 1


def test_nothing_starts_before_it_is_drained() -> None:
    drain(pytest.fail, nothing, CancelSignal())


def test_outside_coglet_an_answer_runs_to_its_end() -> None:
    assert list(drain(lambda: Counting(length=2), nothing, current_signal())) == ["0", "1"]


@pytest.mark.parametrize(
    ("fault", "raised"),
    [(ValueError("a secret prompt"), EngineError), (CancelationException(), asyncio.CancelledError)],
)
def test_what_goes_wrong_at_the_start_is_told_like_what_does_later(fault: Exception, raised: type[Exception]) -> None:
    def start() -> Counting:
        raise fault

    with pytest.raises(raised) as caught:
        next(drain(start, nothing, CancelSignal()))
    assert "secret" not in str(caught.value)


def test_a_whole_answer_is_recorded_then_closed() -> None:
    recorded: list[int] = []
    counting = Counting(length=3)
    assert list(drain(lambda: counting, lambda g: recorded.append(g.closed), CancelSignal())) == ["0", "1", "2"]
    assert recorded == [0]
    assert counting.closed == 1


def test_closing_the_stream_midway_closes_the_generation() -> None:
    counting = Counting()
    chunks = drain(lambda: counting, nothing, CancelSignal())
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert counting.closed == 1


PREDICTION_ID: ContextVar[str] = ContextVar("_coglet_prediction_id")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(coglet, "FOLDERS", tmp_path / "coglet" / "predictions")
    return tmp_path / "coglet" / "predictions"


def discard(prediction_id: str) -> None:
    context = copy_context()
    context.run(PREDICTION_ID.set, prediction_id)
    context.run(coglet.discard_folders)


def test_the_folders_of_a_prediction_are_removed_if_they_are_empty(folders: Path) -> None:
    for name in ("mine", "full", "another"):
        for kind in ("inputs", "outputs"):
            (folders / name / kind).mkdir(parents=True)
    kept = folders / "full" / "outputs" / "of somebody"
    kept.touch()
    for name in ("mine", "full", "never there"):
        discard(name)
    coglet.discard_folders()  # outside any prediction
    assert [path.name for path in folders.iterdir() if path.name != "another"] == ["full"]
    assert list((folders / "full").rglob("*")) == [kept.parent, kept]
    assert len(list((folders / "another").iterdir())) == 2


@pytest.mark.parametrize("prediction_id", ["", ".", "..", "../else", "a/b"])
def test_an_id_that_is_a_path_removes_no_other_folder(folders: Path, prediction_id: str) -> None:
    (folders / "a").mkdir(parents=True)
    for kind in ("inputs", "outputs"):
        (folders / prediction_id / kind).mkdir(parents=True)
    discard(prediction_id)
    assert all((folders / prediction_id / kind).is_dir() for kind in ("inputs", "outputs"))


@pytest.mark.parametrize(
    ("fault", "raised", "text", "logged"),
    [
        (RequestError("too long"), RequestError, "too long", False),
        (EngineStoppedError("stopped"), EngineStoppedError, "stopped", True),
        (ValueError("boom"), EngineError, r"failed on this request \(ValueError\)", True),
    ],
)
def test_faults(
    fault: Exception, raised: type[Exception], text: str, logged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    counting = Counting(fault)
    said: list[str] = []
    with pytest.raises(raised, match=text):
        for chunk in drain(lambda: counting, nothing, CancelSignal()):
            said.append(chunk)
    assert said == ["0", "1"]
    assert counting.closed == 1
    assert ("Traceback" in capsys.readouterr().err) == logged
