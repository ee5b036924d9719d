"""Stop sequences: the same result for every way of cutting the text, nothing leaked, nothing held too long."""

from hypothesis import given
from hypothesis import strategies as st

from starling.stops import StopMatcher

# Few letters, so that stops overlap, nest and nearly match.
texts = st.text("ab\n", max_size=30)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Plain definition: cut before the stop that completes first; of those that end together, the longest."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(texts, max_size=8), stops)
def test_cutting_does_not_matter(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.feed(piece) for piece in pieces) + matcher.flush()
    assert (shown, matcher.matched) == first_stop("".join(pieces), stops)


@given(texts, stops)
def test_nothing_is_held_that_cannot_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += matcher.feed(character)
        if matcher.matched:
            return
        held = text[len(shown) : end]
        assert text[:end] == shown + held
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_over_three_pieces_never_leaks() -> None:
    matcher = StopMatcher(["<END>"])
    assert [matcher.feed(piece) for piece in ("one <E", "N", "D> two", "three")] == ["one ", "", "", ""]
    assert matcher.matched == "<END>"


def test_a_start_of_the_longest_stop_is_held_despite_shorter_stops() -> None:
    matcher = StopMatcher(["X", "<END>"])
    assert [matcher.feed(piece) for piece in ("one <EN", "D>")] == ["one ", ""]


def test_a_near_miss_is_released_at_once() -> None:
    matcher = StopMatcher(["<END>"])
    assert [matcher.feed(piece) for piece in ("a <EN", "T")] == ["a ", "<ENT"]
