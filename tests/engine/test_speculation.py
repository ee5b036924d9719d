"""Prompt lookup alone: what is drafted, and how much and how soon after drafts were right or wrong."""

from hypothesis import given
from hypothesis import strategies as st

from starling.engine.speculation import MAX_BACKOFF, MAX_DRAFT, NGRAM, PromptLookup

TEXT = [*range(20), *range(NGRAM)]  # its end occurred before, with 17 tokens in between


def drafted(lookup: PromptLookup) -> int:
    """How many tokens it drafts now, if nothing else limits them."""
    draft = lookup.draft(TEXT, limit=100)
    assert draft == TEXT[NGRAM : NGRAM + len(draft)]
    return len(draft)


def test_drafts_are_made_when_text_repeats_and_stop_when_they_fail() -> None:
    lookup = PromptLookup()
    assert lookup.draft([1, 2, 3, 4, 1, 2, 3], limit=8) == [4, 1]
    lookup.learn(2, 2, 10)
    assert lookup.draft([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], limit=8) == [4, 5, 6, 7]
    lookup.learn(4, 0, 11)
    assert lookup.draft([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 1, 2, 3], limit=8) == []


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8))
def test_what_followed_the_last_occurrence_is_drafted(pieces: list[list[int]]) -> None:
    """However many tokens came since it was last asked."""
    lookup, tokens = PromptLookup(), list[int]()
    for piece in pieces:
        tokens += piece
        final, earlier = tokens[-NGRAM:], range(NGRAM, len(tokens))
        found = [(tokens[end:] * 2)[:2] for end in earlier if tokens[end - NGRAM : end] == final]
        assert lookup.draft(tokens, limit=8) == (found[-1] if found else [])


def test_the_draft_goes_round_where_the_text_does() -> None:
    lookup = PromptLookup()
    for _ in range(2):
        lookup.learn(1, 1, 0)
    assert lookup.draft([7, 8, 1, 2, 1, 2, 1], limit=7) == [2, 1, 2, 1, 2, 1, 2]
    assert lookup.draft([7, 8, 1, 2, 1, 2, 1, 5, 5, 5, 5], limit=8) == [5] * 8


def test_drafts_grow_while_they_are_right_and_shrink_to_what_was_right() -> None:
    lookup = PromptLookup()
    lengths = []
    for right in (2, 4, 8, 8, 5, 6, 4, 3, 0):
        lengths.append(drafted(lookup))
        lookup.learn(lengths[-1], right, size=0)
    assert lengths == [2, 4, 8, MAX_DRAFT, 8, 6, 8, 5, 4]
    assert drafted(lookup) == 2, "and start over when hardly any was"


def test_the_backoff_after_wrong_drafts_doubles_until_one_is_right() -> None:
    lookup = PromptLookup()

    def backoff() -> int:
        """Tokens that the text grows by before it drafts again."""
        lookup.learn(2, 0, len(TEXT))
        longer = [TEXT[:-NGRAM] + [30] * more + TEXT[-NGRAM:] for more in range(2 * MAX_BACKOFF)]
        return next(more for more, text in enumerate(longer) if lookup.draft(text, limit=8))

    assert [backoff() for _ in range(8)] == [4, 8, 16, 32, 64, 128, MAX_BACKOFF, MAX_BACKOFF]
    lookup.learn(2, 2, len(TEXT))
    assert [backoff() for _ in range(2)] == [4, 8]


def test_no_more_is_drafted_than_there_is_room_for() -> None:
    lookup = PromptLookup()
    assert [lookup.draft(TEXT, limit) for limit in (-1, 0, 1)] == [[], [], TEXT[NGRAM : NGRAM + 1]]
