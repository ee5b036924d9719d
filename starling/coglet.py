"""How streaming, concurrency and cancellation work together in Cog's server (coglet).

coglet streams concurrently only what `async def predict` *returns* as a sync generator, and it drains that generator
on a thread of its own, after the coroutine has ended. It cancels a prediction by calling `.cancel()` on the future
that `asyncio.run_coroutine_threadsafe` returned. By then that future is done, so the call would not reach the
generator. `install_cancellation` therefore wraps that function: each future carries a `CancelSignal`, and `predict`
finds its own through `current_signal`.

A prediction that is cancelled before that future exists is stopped in another way: coglet raises CancelationException
in the thread that serves it, at whatever line that thread has reached. `_submit` and `drain`, where that line can be
ours, turn it into a cancelled prediction; otherwise the prediction would end as failed. If the line is in the future's
own code, coglet goes by the error's text, so we give the exception a text that says "cancelled".

For each prediction coglet creates folders for input and output files and leaves them behind, 12 kB of disk each time;
`discard_folders` removes them.
"""

import asyncio
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import suppress
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cog import CancelationException

from starling.errors import GenerationCancelled, RequestError, StarlingError, unexpected

T = TypeVar("T")

FOLDERS = Path("/tmp/coglet/predictions")  # fixed in coglet


class CancelSignal:
    """Tells a prediction, from any thread, that its caller has cancelled it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fired = False
        self._action: Callable[[], None] | None = None

    def fire(self) -> None:
        with self._lock:
            self._fired = True
            action = self._action
        if action is not None:
            action()

    def connect(self, action: Callable[[], None]) -> None:
        """Call `action` when the signal fires, or at once if it already has."""
        with self._lock:
            self._action = action
            fired = self._fired
        if fired:
            action()

    def disconnect(self) -> None:
        """Drop the action: there is nothing left to stop, and nothing to keep alive."""
        with self._lock:
            self._action = None


_signal: ContextVar[CancelSignal | None] = ContextVar("starling_cancel_signal", default=None)
_run_coroutine_threadsafe = asyncio.run_coroutine_threadsafe


def current_signal() -> CancelSignal:
    """The signal of the prediction that this coroutine serves; outside coglet, one that never fires."""
    return _signal.get() or CancelSignal()


def install_cancellation() -> None:
    """Make every future that coglet gets from now on carry a signal. Idempotent."""
    asyncio.run_coroutine_threadsafe = _submit  # type: ignore[assignment]
    CancelationException.__str__ = lambda error: "cancelled"  # type: ignore[method-assign]


def _submit(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> "Future[T]":
    """asyncio.run_coroutine_threadsafe, but cancelling the future also fires its signal."""
    try:
        return _submit_with_signal(coroutine, loop)
    except CancelationException:
        # If the coroutine runs anyway, nobody drains the generator that it returns, so nothing starts.
        future: Future[T] = Future()
        future.cancel()
        future.set_running_or_notify_cancel()
        return future


def _submit_with_signal(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> "Future[T]":
    signal = CancelSignal()
    token = _signal.set(signal)  # the loop copies this thread's context into the coroutine
    try:
        future = _run_coroutine_threadsafe(coroutine, loop)
    finally:
        _signal.reset(token)
    cancel_future = future.cancel

    def cancel() -> bool:
        signal.fire()
        return cancel_future()

    future.cancel = cancel  # type: ignore[method-assign]
    return future


def discard_folders() -> None:
    """Remove the folders of the prediction that this coroutine serves.

    They are no longer needed: inputs too large for coglet's pipe (6 MiB) have already been read from their file, and no
    chunk of an answer is that large. If the ID is a path, its folders are left alone: they may not be coglet's.
    """
    names = {variable.name: value for variable, value in copy_context().items()}
    prediction_id = names.get("_coglet_prediction_id", "")
    if "/" in prediction_id or prediction_id in ("", ".", ".."):
        return
    folder = FOLDERS / prediction_id
    for each in (folder / "inputs", folder / "outputs", folder):
        with suppress(OSError):
            each.rmdir()


class CancellableStream(Protocol):
    """What the service returns for one request."""

    def __iter__(self) -> Iterator[str]: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...


G = TypeVar("G", bound=CancellableStream)


def drain(start: Callable[[], G], record: Callable[[G], None], signal: CancelSignal) -> Iterator[str]:
    """Start a generation, yield its text and, if it runs to its end, record it.

    Nothing happens before the first `next`, so a prediction that is cancelled before coglet drains it never starts.
    All errors are raised here rather than in the coroutine, where coglet would treat any error whose text contains
    "cancelled" as a cancellation.

    Raises asyncio.CancelledError, which coglet reports as "canceled" with the text so far; RequestError if the caller
    is at fault; other StarlingErrors, which are also logged. Any other error is logged, and reported without its text,
    which may quote the prompt.
    """
    try:
        generation = start()
        try:
            signal.connect(generation.cancel)
            yield from generation
            record(generation)
        finally:
            # The future, its `cancel` and the signal form a reference cycle, and whatever they refer to would stay
            # alive until Python's next full garbage collection, which is rare.
            signal.disconnect()
            generation.close()
    except (GenerationCancelled, CancelationException):
        raise asyncio.CancelledError from None
    except RequestError:
        raise
    except StarlingError:
        traceback.print_exc()
        raise
    except Exception as error:
        traceback.print_exc()
        raise unexpected(error) from error
