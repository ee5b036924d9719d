"""One answer in isolation: its stream is fed by hand, on a clock that advances only while something waits."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from starling import tokenizer_json
from starling.engine.engine import Delivery
from starling.errors import EngineError, GenerationCancelled
from starling.generation import Generation
from starling.request import Request
from starling.tokenizer import IncrementalDecoder, Tokenizer, byte_alphabet

END = 256
TOKENIZER = Tokenizer(tokenizer_json.byte_level(byte_alphabet() | {"<end>": END}, [], {"<end>": END}), END + 1)


class Feed:
    """An engine's stream whose deliveries arrive at given times, and the clock."""

    def __init__(self, *deliveries: tuple[float, Delivery]) -> None:
        self.now_s = 0.0
        self.cancelled = False
        self._coming = deque(deliveries)
        self._timed_out = False

    def monotonic(self) -> float:
        return self.now_s

    def get(self, timeout_s: float | None = None) -> Delivery | None:
        assert timeout_s is None or not self._timed_out, "with nothing to show, it must sleep until a token comes"
        due_s, delivery = self._coming[0]
        self._timed_out = timeout_s is not None and due_s > self.now_s + timeout_s
        if self._timed_out:
            self.now_s += timeout_s or 0
            return None
        self._coming.popleft()
        self.now_s = max(self.now_s, due_s)
        return delivery

    def wait_until_finished(self, timeout_s: float) -> None:
        last_s = max(self.now_s, self._coming[-1][0])
        self.now_s = min(last_s, self.now_s + timeout_s)

    def cancel(self) -> None:
        self.cancelled = True


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begins an answer whose chunks are at least 4 s apart, and records its reported outcomes in `.ends`."""

    def begin(feed: Feed, **fields: Any) -> Generation:
        monkeypatch.setattr("starling.generation.time", SimpleNamespace(monotonic=feed.monotonic))
        monkeypatch.setattr("starling.generation.COALESCE_S", 4.0)
        begin.ends = []  # type: ignore[attr-defined]
        return Generation(
            feed,  # type: ignore[arg-type]
            IncrementalDecoder(TOKENIZER),
            Request.parse(**{"prompt": "x", **fields}),
            1,
            seed=0,
            on_end=lambda _, outcome: begin.ends.append(outcome),  # type: ignore[attr-defined]
        )

    return begin


def said(text: str, finish: Any = None) -> Delivery:
    return Delivery([*TOKENIZER.encode(text), *([END] if finish == "stop" else [])], finish)


@pytest.mark.parametrize("stops", [[], ["no such text"]], ids=["patient", "woken"])
def test_chunks_keep_their_distance(answer: Any, stops: list[str]) -> None:
    feed = Feed(*((10.0 + i, said("abcdefghi"[i])) for i in range(9)), (40, said("j")), (41, said("", "stop")))
    chunks = [(feed.now_s, chunk) for chunk in answer(feed, stop_sequences=stops)]
    assert chunks == [(10, "a"), (14, "bcde"), (18, "fghi"), (40, "j")]


def test_times_are_counted_from_the_first_token(answer: Any) -> None:
    generation = answer(Feed((10, said("a")), (12, said("bc")), (20, said("de")), (25, said("", "stop"))))
    assert "".join(generation) == "abcde"
    assert (generation.result.time_to_first_token, generation.result.tokens_per_second) == (10, round(4 / 15, 3))
    assert generation.age_s == 25


def test_the_rate_of_a_single_token_is_counted_from_submission(answer: Any) -> None:
    generation = answer(Feed((10, said("a", "length"))))
    assert list(generation) == ["a"]
    assert (generation.result.time_to_first_token, generation.result.tokens_per_second) == (10, 0.1)


def test_a_stop_sequence_counts_from_the_token_after_min_tokens_on(answer: Any) -> None:
    generation = answer(Feed((0, said("abbb"))), stop_sequences=["b"], min_tokens=2)
    assert "".join(generation) == "ab"
    assert (generation.result.finish_reason, generation.result.output_token_count) == ("stop_sequence", 3)


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_what_might_have_become_a_stop_sequence_is_shown_at_the_end(answer: Any, finish: str) -> None:
    generation = answer(Feed((0, said("a <EN")), (1, said("", finish))), stop_sequences=["<END>"])
    assert "".join(generation) == "a <EN"
    assert generation.result.finish_reason == finish


def test_the_replacement_for_a_broken_character_can_match_a_stop_sequence(answer: Any) -> None:
    generation = answer(Feed((0, Delivery([*said("a🦜").tokens[:-1], END], "stop"))), stop_sequences=["\ufffd"])
    assert "".join(generation) == "a"
    assert generation.result.finish_reason == "stop_sequence"


@pytest.mark.parametrize(
    ("last", "outcome"),
    [
        (said("b", "stop"), "stop"),
        (said("b", "length"), "length"),
        (said("b."), "stop_sequence"),
        (Delivery([], "cancelled"), "cancelled"),
        (Delivery([], "error", EngineError("it broke")), "EngineError"),
    ],
)
def test_every_outcome_is_reported_once(answer: Any, last: Delivery, outcome: str) -> None:
    generation = answer(Feed((0, said("a")), (1, last)), stop_sequences=["."])
    assert next(generation) == "a"
    if last.finish in ("cancelled", "error"):
        with pytest.raises((GenerationCancelled, EngineError)):
            list(generation)
        assert generation.result is None
    else:
        assert list(generation) == ["b"]
    assert list(generation) == []
    generation.close()
    assert answer.ends == [outcome]


def test_closing_midway_stops_the_generation(answer: Any) -> None:
    generation = answer(feed := Feed((0, said("a")), (1, said("b", "stop"))))
    next(generation)
    generation.close()
    assert feed.cancelled and list(generation) == [] and answer.ends == ["disconnected"]


def test_closing_before_the_first_chunk_stops_the_generation(answer: Any) -> None:
    answer(feed := Feed((0, said("a", "stop")))).close()
    assert feed.cancelled


def test_an_error_of_our_own_stops_the_generation(answer: Any) -> None:
    generation = answer(feed := Feed((0, Delivery([END + 1]))))  # no such token
    with pytest.raises(IndexError):
        next(generation)
    assert feed.cancelled and answer.ends == ["IndexError"]
