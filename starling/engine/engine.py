"""The loop: plan, step, deliver. Requests are submitted and cancelled from any thread; one thread does the rest.

Where the device computes asynchronously, the loop works one step behind it: the next step is planned and started before
the tokens of the one in flight are collected and delivered, so the device never waits for the host.
"""

import atexit
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from starling.engine.runner import Step, StepRunner
from starling.engine.scheduler import Counters, Outcome, Scheduler, Work
from starling.engine.sequence import FinishReason, SamplingParams, Sequence, TokenConstraint
from starling.engine.speculation import PromptLookup
from starling.engine.step_watch import StepWatch
from starling.errors import DeviceError, EngineError, EngineStoppedError, NoRoomError, RequestError, StarlingError

logger = logging.getLogger(__name__)

NOTHING_TO_DRAW = (
    "After this text the model's logits hold no finite number, so no token can be drawn. Change the text; if every "
    "text fails this way, the weights are damaged: download them again."
)


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a step produced for one request. The last one has `finish`, and `error` if the request failed."""

    tokens: list[int]
    finish: FinishReason | None = None
    error: StarlingError | None = None
    cached_tokens: int = 0  # prompt tokens that did not have to be computed


class TokenStream:
    """The caller's end of one request: deliveries to take, and a way to stop it. Safe from any thread."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        self._queue: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._ended = threading.Event()  # the last delivery has been put
        self._cancel = cancel

    def get(self, timeout_s: float | None = None) -> Delivery | None:
        """The next delivery; None when `timeout_s` passes without one."""
        try:
            return self._queue.get(block=timeout_s is None or timeout_s > 0, timeout=timeout_s)
        except queue.Empty:
            return None

    def wait_until_finished(self, timeout_s: float) -> None:
        """Sleep until the last delivery arrives, for at most `timeout_s`: earlier deliveries wake nobody."""
        self._ended.wait(timeout_s)

    def put(self, delivery: Delivery) -> None:
        """The engine's end."""
        self._queue.put(delivery)
        if delivery.finish is not None:
            self._ended.set()

    def cancel(self) -> None:
        """Stop at the next step. A last delivery with finish "cancelled" follows unless the request ended before."""
        self._cancel()


def check_request(prompt: list[int], max_tokens: int, context_limit: int, vocab_size: int) -> None:
    """Raises RequestError when no engine could serve it with a model of these sizes, both in tokens."""
    if not prompt:
        raise RequestError("The prompt has no tokens; at least one is needed.")
    foreign = [token for token in prompt if not 0 <= token < vocab_size]
    if foreign:
        raise RequestError(
            f"The prompt holds token id {foreign[0]}; the model's embedding table has ids 0 to {vocab_size - 1}."
        )
    if len(prompt) + max_tokens > context_limit:
        raise no_room(len(prompt), max_tokens, "the model's context", context_limit)


def no_room(prompt_length: int, max_tokens: int, where: str, limit: int) -> NoRoomError:
    """The error that refuses a request too large for `where`, which holds `limit` tokens."""
    room = limit - prompt_length
    if room > 0:
        remedy = f"Lower max_tokens to {room}" + (" or less" if room > 1 else "")
    elif limit > max_tokens:
        remedy = f"Shorten the prompt to {limit - max_tokens} tokens or fewer"
    else:
        remedy = f"Shorten the prompt to {limit - 1} tokens or fewer, and lower max_tokens to what it leaves"
    return NoRoomError(
        f"The prompt is {prompt_length} tokens long and max_tokens is {max_tokens}, {prompt_length + max_tokens} "
        f"together; {where} holds {limit}. {remedy}."
    )


def grammar_error(fault: str) -> RequestError:
    """The error that ends a request whose constraint has this fault."""
    return RequestError(f"The grammar failed while the answer was generated: {fault}. Fix or simplify it.")


@dataclass(frozen=True, slots=True)
class _Flight:
    plan: list[Work]
    step: Step


@dataclass(slots=True)
class _Command:
    kind: Literal["submit", "cancel", "stop"]
    sequence: Sequence | None = None
    stream: TokenStream | None = None


class Engine:
    """Serves token ids for many requests at once.

    `context_limit` is the longest prompt and answer together, in tokens; `hang_after_s` is how long a single step may
    take before the engine counts as hung.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        context_limit: int,
        vocab_size: int,
        hang_after_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._context_limit = context_limit
        self._vocab_size = vocab_size
        self._hang_after_s = hang_after_s
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[int, TokenStream] = {}
        self._arrivals = itertools.count()
        self._inbox_lock = threading.Lock()  # held while a command is put, so that none is lost behind "stop"
        self._closed = False
        self._in_flight: _Flight | None = None
        self._watch = StepWatch(hang_after_s)
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()
        # A thread that still computes once Python has shut down crashes the process: its memory is gone.
        atexit.register(self.close)

    # -- from any thread -----------------------------------------------------------------------------------------

    def check(self, prompt: list[int], max_tokens: int) -> None:
        """Raises RequestError for what can never run, EngineStoppedError while a step hangs."""
        check_request(prompt, max_tokens, self._context_limit, self._vocab_size)
        if not self._scheduler.fits(len(prompt), max_tokens):
            cache = self._scheduler.cache
            where = "this server's KV cache (STARLING_KV_CACHE_BYTES)"
            raise no_room(len(prompt), max_tokens, where, cache.blocks * cache.block_size)
        self._watch.refuse_if_hung()

    def submit(
        self, prompt: list[int], params: SamplingParams, constraint: TokenConstraint | None = None
    ) -> TokenStream:
        """Queue a request. Raises what `check` does, and EngineStoppedError once the engine has stopped."""
        self.check(prompt, params.max_tokens)
        lookup = PromptLookup() if self._scheduler.limits.speculative_rows > 0 else None
        sequence = Sequence(next(self._arrivals), prompt, params, constraint, lookup)
        stream = TokenStream(lambda: self._put(_Command("cancel", sequence)))
        if not self._put(_Command("submit", sequence, stream)):
            raise EngineStoppedError("The engine has stopped and takes no requests. Restart the container.")
        return stream

    @property
    def healthy(self) -> bool:
        """The thread is alive, and no step has been running for longer than `hang_after_s`."""
        return self._thread.is_alive() and not self._closed and not self._watch.hangs

    @property
    def counters(self) -> Counters:
        return self._scheduler.counters

    @property
    def occupancy(self) -> dict[str, int]:
        """Sequences and KV blocks: a snapshot, taken while the engine runs."""
        cache = self._scheduler.cache
        return {
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "kv_blocks": cache.blocks,
            "kv_blocks_free": cache.available,
        }

    def close(self) -> None:
        """End every request with EngineStoppedError and join the thread."""
        atexit.unregister(self.close)
        self._put(_Command("stop"))
        self._thread.join(timeout=self._hang_after_s)

    def _put(self, command: _Command) -> bool:
        with self._inbox_lock:
            if self._closed:
                return False
            self._inbox.put(command)
            return True

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _serve(self) -> None:
        error = EngineStoppedError("The engine was stopped while the request ran.")
        try:
            while self._take_commands():
                self._step()
            self._collect()  # or the device would go on computing in memory that the engine's owner frees
        except BaseException as fault:
            logger.critical("the engine's thread died", exc_info=True)
            error = EngineStoppedError(f"The engine died: {type(fault).__name__}. Restart the container.")
        finally:
            with self._inbox_lock:
                self._closed = True
            self._watch.end()
            # The scheduler is not told: its bookkeeping may be what broke, and nothing needs it any more.
            while not self._inbox.empty():
                command = self._inbox.get()
                if command.sequence is not None and command.stream is not None:
                    self._streams[command.sequence.arrival] = command.stream
            for arrival in list(self._streams):
                self._deliver(arrival, Delivery([], "error", error))

    def _take_commands(self) -> bool:
        """Handle what callers have asked since the last step; sleep while there is nothing to do. False: stop."""
        while self._idle or not self._inbox.empty():
            command = self._inbox.get()
            if command.kind == "stop":
                return False
            self._handle(command)
        return True

    @property
    def _idle(self) -> bool:
        return not self._scheduler.running and not self._scheduler.waiting and self._in_flight is None

    def _handle(self, command: _Command) -> None:
        sequence = command.sequence
        if sequence is None:
            return
        if command.kind == "submit" and command.stream is not None:
            self._streams[sequence.arrival] = command.stream
            self._scheduler.add(sequence)
        elif self._scheduler.remove(sequence):
            self._deliver(sequence.arrival, Delivery([], "cancelled"))

    def _step(self) -> None:
        """Start the next step, then collect the results of the previous one. Without a plan, only the latter."""
        self._watch.begin()
        plan = self._scheduler.plan()
        started = None
        if plan:
            with self._fail_on_error(plan):
                started = _Flight(plan, self._runner.start(plan))
        self._collect()
        self._in_flight = started
        if not self._runner.overlaps:
            self._collect()
        self._watch.end()

    def _collect(self) -> None:
        """Wait for the step in flight, if there is one, and deliver its results."""
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return
        outcomes: list[Outcome] = []
        with self._fail_on_error(flight.plan):
            outcomes = self._scheduler.complete(flight.plan, flight.step.result())
        for outcome in outcomes:
            sequence = outcome.sequence
            delivery = Delivery(outcome.tokens, outcome.finish, None, sequence.cached or 0)
            if outcome.finish == "error":
                logger.error("request %d failed: %s", sequence.arrival, NOTHING_TO_DRAW)
                delivery = Delivery([], "error", EngineError(NOTHING_TO_DRAW))
            elif sequence.constraint is not None:
                broken = self._advance_grammar(sequence.constraint, outcome)
                if broken is not None:
                    self._scheduler.remove(sequence)
                    delivery = Delivery([], "error", grammar_error(broken))
            self._deliver(sequence.arrival, delivery)

    @contextmanager
    def _fail_on_error(self, plan: list[Work]) -> Iterator[None]:
        """An error inside ends the requests of this step, and no others."""
        try:
            yield
        except DeviceError:
            raise  # no later step would do better
        except Exception as fault:
            logger.error("a step failed and ends its %d requests", len(plan), exc_info=True)
            self._collect()  # a request that finishes in the previous step must not fail with this one
            error = EngineError(
                f"The request's step failed: {type(fault).__name__}. The server is still running; try again."
            )
            for sequence in self._scheduler.fail(plan):
                self._deliver(sequence.arrival, Delivery([], "error", error))

    @staticmethod
    def _advance_grammar(constraint: TokenConstraint, outcome: Outcome) -> str | None:
        """Pass the grammar what was chosen. Returns its fault, if that broke it or if a fault ended the answer."""
        if outcome.finish is None:
            for token in outcome.tokens:
                constraint.advance(token)
        return constraint.fault

    def _deliver(self, arrival: int, delivery: Delivery) -> None:
        stream = self._streams.get(arrival)
        if stream is None:
            return
        if delivery.finish is not None:
            del self._streams[arrival]
        stream.put(delivery)
