"""One answer as it is generated: deliveries of tokens in, chunks of text out."""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Literal

from starling.chat import ReplyStart
from starling.engine.engine import Delivery, TokenStream
from starling.errors import GenerationCancelled
from starling.request import Request
from starling.stops import StopMatcher
from starling.tokenizer import IncrementalDecoder

Ending = Literal["stop", "length", "stop_sequence"]
# Minimum time between chunks after the first. Readers see no difference, but it saves the server work.
COALESCE_S = 0.04


@dataclass(frozen=True)
class GenerationResult:
    """The outcome of one request."""

    text: str
    finish_reason: Ending | None  # None: the answer was cut off
    input_token_count: int
    output_token_count: int  # without the token that ends the turn
    cached_token_count: int  # prompt tokens that were still in the cache
    time_to_first_token: float  # seconds from submission
    tokens_per_second: float  # from the first token to the last; for a single token, from submission
    seed: int


class Generation(Iterator[str]):
    """One answer as it is generated: chunks of text, the first at once and later ones about 40 ms apart.

    Iterating raises GenerationCancelled after `cancel`, RequestError if the grammar cannot continue, EngineError if
    the engine fails. `result` is set once the answer is complete.
    """

    def __init__(
        self,
        stream: TokenStream,
        decoder: IncrementalDecoder,
        request: Request,
        input_token_count: int,
        seed: int,
        on_end: Callable[["Generation", str], None] = lambda generation, outcome: None,
    ) -> None:
        """`on_end` is called once, when an iteration that has begun ends, with the outcome: a finish reason,
        "cancelled", "disconnected" or an error's name.
        """
        self.request = request
        self.result: GenerationResult | None = None
        self._on_end = on_end
        self._stream = stream
        self._decoder = decoder
        self._reply = ReplyStart()
        self._stops = StopMatcher(request.stop_sequences)
        # Wake for every token only if its text can end the answer: 32 threads that wake at every step would take the
        # GIL from the engine just as often.
        self._patient = not request.stop_sequences
        self._min_tokens = request.min_tokens
        self._input_token_count = input_token_count
        self._seed = seed
        self._submitted_s = time.monotonic()
        self._first_s: float | None = None
        self._last_s = self._submitted_s
        self._tokens = 0
        self._cached_tokens = 0
        self._text: list[str] = []
        self._chunks = self._coalesce()

    def __next__(self) -> str:
        return next(self._chunks)

    def cancel(self) -> None:
        """Stop the generation. Safe from any thread."""
        self._stream.cancel()

    def close(self) -> None:
        """Stop the generation if it is still running, and end the iterator."""
        self._chunks.close()
        self._stream.cancel()  # in case it was never iterated

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._submitted_s

    def _coalesce(self) -> Generator[str, None, None]:
        buffer, sent_s = "", -COALESCE_S
        finish: Ending | None = None
        outcome = "disconnected"  # unless the answer ends or fails before its reader leaves
        try:
            while finish is None:
                pause_s = max(0.0, sent_s + COALESCE_S - time.monotonic())
                if self._patient and pause_s > 0:
                    self._stream.wait_until_finished(pause_s)
                    pause_s = 0.0
                delivery = self._stream.get(pause_s if buffer else None)
                if delivery is not None:
                    text, finish = self._take(delivery)
                    buffer += text
                else:  # everything received so far is in the buffer
                    self._text.append(buffer)
                    yield buffer
                    buffer, sent_s = "", time.monotonic()
            self._text.append(buffer)
            self.result = self.summary(finish)
            outcome = finish
            if finish == "stop_sequence":  # the engine does not see it, and would keep generating for a slow reader
                self._stream.cancel()
            if buffer:
                yield buffer
        except GenerationCancelled:
            outcome = "cancelled"
            raise
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            if self.result is None:
                self._stream.cancel()
            self._on_end(self, outcome)

    def _take(self, delivery: Delivery) -> tuple[str, Ending | None]:
        """The text that a delivery adds, and the finish reason if the answer ends with it."""
        finish = delivery.finish
        if delivery.error is not None:
            raise delivery.error
        if finish == "cancelled":
            raise GenerationCancelled("The generation was cancelled.")
        assert finish != "error"  # such a delivery carries its error
        self._cached_tokens = delivery.cached_tokens
        tokens = delivery.tokens[:-1] if finish == "stop" else delivery.tokens
        self._last_s = time.monotonic()
        if self._first_s is None:
            self._first_s = self._last_s
        text = ""
        for token in tokens:
            self._tokens += 1
            text += self._show(self._decoder.feed(token))
            if self._stops.matched is not None:
                return text, "stop_sequence"
        if finish == "stop":
            text += self._show(self._decoder.flush())  # at "length", an incomplete character is dropped
            if self._stops.matched is not None:
                return text, "stop_sequence"
        if finish is not None:
            text += self._stops.flush()
        return text, finish

    def _show(self, text: str) -> str:
        text = self._reply.feed(text)
        # Stop sequences are matched only in text after the first min_tokens tokens.
        return self._stops.feed(text) if self._tokens > self._min_tokens else text

    def summary(self, finish: Ending | None = None) -> GenerationResult:
        """The result as of now."""
        first_s = self._first_s or self._last_s
        since, made = (first_s, self._tokens - 1) if self._tokens > 1 else (self._submitted_s, self._tokens)
        return GenerationResult(
            text="".join(self._text),
            finish_reason=finish,
            input_token_count=self._input_token_count,
            output_token_count=self._tokens,
            cached_token_count=self._cached_tokens,
            time_to_first_token=round(first_s - self._submitted_s, 6),
            tokens_per_second=round(made / max(self._last_s - since, 1e-9), 3),
            seed=self._seed,
        )
