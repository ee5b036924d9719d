"""Prompt lookup alone: what is guessed, and how much and how soon after guesses were right or wrong."""

from hypothesis import given
from hypothesis import strategies as st

from starling.engine.speculation import MAX_BACKOFF, MAX_DRAFT, NGRAM, PromptLookup

TEXT = [*range(20), *range(NGRAM)]  # its end was said before, and 17 tokens came after it


def guessed(lookup: PromptLookup) -> int:
    """How many tokens it guesses now, if nothing else bounds them."""
    draft = lookup.draft(TEXT, limit=100)
    assert draft == TEXT[NGRAM : NGRAM + len(draft)]
    return len(draft)


def test_drafts_are_taken_when_text_repeats_and_stop_when_they_fail() -> None:
    lookup = PromptLookup()
    assert lookup.draft([1, 2, 3, 4, 1, 2, 3], limit=8) == [4, 1]
    lookup.judge(2, 2, 10)
    assert lookup.draft([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], limit=8) == [4, 5, 6, 7]
    lookup.judge(4, 0, 11)
    assert lookup.draft([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 1, 2, 3], limit=8) == []


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8))
def test_what_followed_the_last_occurrence_is_guessed(pieces: list[list[int]]) -> None:
    """However many tokens came since it was last asked."""
    lookup, tokens = PromptLookup(), list[int]()
    for piece in pieces:
        tokens += piece
        final, earlier = tokens[-NGRAM:], range(NGRAM, len(tokens))
        found = [tokens[end : end + 2] for end in earlier if tokens[end - NGRAM : end] == final]
        assert lookup.draft(tokens, limit=8) == (found[-1] if found else [])


def test_drafts_grow_while_they_are_right_and_shrink_to_what_was() -> None:
    lookup = PromptLookup()
    lengths = []
    for right in (2, 4, 8, 8, 5, 6, 4, 3, 0):
        lengths.append(guessed(lookup))
        lookup.judge(lengths[-1], right, size=0)
    assert lengths == [2, 4, 8, MAX_DRAFT, 8, 6, 8, 5, 4]
    assert guessed(lookup) == 2, "and begin anew where hardly any was"


def test_the_pause_after_wrong_guesses_doubles_until_one_is_right() -> None:
    lookup = PromptLookup()

    def pause() -> int:
        """Tokens that the text grows by before it guesses again."""
        lookup.judge(2, 0, len(TEXT))
        longer = [TEXT[:-NGRAM] + [30] * more + TEXT[-NGRAM:] for more in range(2 * MAX_BACKOFF)]
        return next(more for more, text in enumerate(longer) if lookup.draft(text, limit=8))

    assert [pause() for _ in range(8)] == [4, 8, 16, 32, 64, 128, MAX_BACKOFF, MAX_BACKOFF]
    lookup.judge(2, 2, len(TEXT))
    assert [pause() for _ in range(2)] == [4, 8]


def test_no_more_is_guessed_than_there_is_room_for() -> None:
    lookup = PromptLookup()
    assert [lookup.draft(TEXT, limit) for limit in (-1, 0, 1)] == [[], [], TEXT[NGRAM : NGRAM + 1]]
