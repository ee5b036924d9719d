"""How streaming, concurrency and cancelling meet in Cog's server (coglet).

coglet streams side by side only what `async def predict` *returns* as a sync generator, and it drains that generator
on a thread of its own, after the coroutine has ended. It cancels a prediction by calling `.cancel()` on the future
that `asyncio.run_coroutine_threadsafe` gave it, which by then is done, so nothing would reach the generator. Therefore
`install_cancellation` wraps that function once: each future carries a `CancelSignal`, and `predict` finds its own
through `current_signal`.

A prediction that is cancelled before that future exists is hit otherwise: coglet raises CancelationException in the
thread that serves it, at whatever line that thread has reached. Both places where that can be our line turn it into a
cancelled prediction; else it would end as a failed one. Where it is a line of the future's own, coglet goes by the
error's text, so the exception gets one that says "cancelled".

For each prediction coglet makes folders for files that come and go, and leaves them, 12 kB of disk each time:
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

from starling.errors import GenerationCancelled, RequestError, StarlingError, unforeseen

T = TypeVar("T")

FOLDERS = Path("/tmp/coglet/predictions")  # fixed in coglet


class CancelSignal:
    """Says once, from any thread, that the caller wants no more."""

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
        """Have `action` called when the signal fires: at once if it has fired already."""
        with self._lock:
            self._action = action
            fired = self._fired
        if fired:
            action()

    def disconnect(self) -> None:
        """From here on nothing is left to stop, nor kept for it."""
        with self._lock:
            self._action = None


_signal: ContextVar[CancelSignal | None] = ContextVar("starling_cancel_signal", default=None)
_run_coroutine_threadsafe = asyncio.run_coroutine_threadsafe


def current_signal() -> CancelSignal:
    """The signal of the prediction that this coroutine serves; outside coglet one that never fires."""
    return _signal.get() or CancelSignal()


def install_cancellation() -> None:
    """Make every future that coglet gets from now on carry a signal. Calling it again changes nothing."""
    asyncio.run_coroutine_threadsafe = _submit  # type: ignore[assignment]
    CancelationException.__str__ = lambda error: "cancelled"  # type: ignore[method-assign]


def _submit(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> "Future[T]":
    """asyncio.run_coroutine_threadsafe, whose future also fires a signal when it is cancelled."""
    try:
        return _submit_with_signal(coroutine, loop)
    except CancelationException:
        # If the coroutine runs all the same, what it returns is drained by nobody, and starts nothing.
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

    Neither is needed from here on: inputs too large for coglet's pipe (6 MiB) have been read from their file, and no
    chunk of an answer is as large. Those of an ID that is a path are left: it may lead to what is not coglet's.
    """
    names = {variable.name: value for variable, value in copy_context().items()}
    prediction_id = names.get("_coglet_prediction_id", "")
    if "/" in prediction_id or prediction_id in ("", ".", ".."):
        return
    folder = FOLDERS / prediction_id
    for each in (folder / "inputs", folder / "outputs", folder):
        with suppress(OSError):
            each.rmdir()


class Generation(Protocol):
    """What the service hands out for one request."""

    def __iter__(self) -> Iterator[str]: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...


G = TypeVar("G", bound=Generation)


def drain(start: Callable[[], G], record: Callable[[G], None], signal: CancelSignal) -> Iterator[str]:
    """Start a generation and yield its text; when it has ended by itself, record it.

    Nothing happens before the first `next`: a prediction that is cancelled before coglet drains it has started
    nothing. Everything is raised here rather than in the coroutine, where coglet takes any error whose text holds the
    word "cancelled" for a cancelled prediction.

    Raises asyncio.CancelledError, which coglet reports as "canceled" with the text so far; RequestError for the
    caller; other StarlingErrors as they are. An error of any other kind is logged and reported without its text,
    which may quote the prompt's.
    """
    try:
        generation = start()
        try:
            signal.connect(generation.cancel)
            yield from generation
            record(generation)
        finally:
            # The future, its `cancel` and the signal hold one another: what they lead to would stay until Python's
            # next full collection, which is rare.
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
        raise unforeseen(error) from error
