"""Prompt lookup: draft the next tokens from an earlier occurrence of the last few, and let the model verify them.

Drafts cost rows in a step, so they must pay: they grow while they are accepted, and stop for longer and longer while
they are not. (Saxena 2023, "Prompt lookup decoding".)
"""

NGRAM = 3  # tokens that must match before a draft is made
MAX_DRAFT = 8  # most tokens in one draft
MAX_BACKOFF = 256  # most tokens without a draft after repeated failures


class PromptLookup:
    """Drafts for one sequence. Holds the last position of every n-gram seen so far."""

    __slots__ = ("_backoff", "_indexed", "_last", "_length", "_resume_at")

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}  # n-gram → position after it
        self._indexed = 0  # n-grams ending before this position are in the table
        self._length = 2  # tokens of the next draft
        self._backoff = 4
        self._resume_at = 0  # no drafts before the sequence has this many tokens

    def draft(self, tokens: list[int], limit: int) -> list[int]:
        """Up to `limit` tokens that followed the latest earlier occurrence of the final n-gram; often none.

        Where that occurrence is so near that fewer follow, the text repeats itself: so does the draft.
        """
        size = len(tokens)
        if size < self._resume_at or size <= NGRAM or limit <= 0:
            return []
        # The final n-gram itself is indexed only once something follows it.
        for end in range(max(self._indexed, NGRAM), size):
            self._last[tuple(tokens[end - NGRAM : end])] = end
        self._indexed = size
        found = self._last.get(tuple(tokens[size - NGRAM :]))
        if found is None:
            return []
        count, period = min(self._length, limit), size - found
        return [tokens[found + i % period] for i in range(count)]

    def learn(self, proposed: int, accepted: int, size: int) -> None:
        """Adapt to a verified draft: `accepted` of its tokens were right; the sequence now has `size` tokens."""
        if accepted == proposed:
            self._length = min(MAX_DRAFT, self._length * 2)
            self._backoff = 4
        elif accepted * 2 >= proposed:
            self._length = accepted + 1
        else:
            self._length = 2
            self._resume_at = size + self._backoff
            self._backoff = min(MAX_BACKOFF, self._backoff * 2)
