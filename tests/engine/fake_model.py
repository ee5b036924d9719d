"""A model of a few lines, for the loop: the next token is a function of the tokens so far."""

import zlib
from array import array
from collections.abc import Sequence as Tokens

from starling.engine.scheduler import Work


def next_token(tokens: Tokens[int], vocabulary: int = 7) -> int:
    """Depends on the last five tokens alone, so that answers sometimes repeat and drafts are sometimes right."""
    return zlib.crc32(array("i", tokens[-5:]).tobytes()) % vocabulary


class FakeRunner:
    """Computes `next_token` for every sampled row of a plan."""

    def run(self, plan: list[Work]) -> list[list[int]]:
        return [
            [next_token(w.sequence.tokens + w.drafts[:ahead]) for ahead in range(1 + len(w.drafts))]
            if w.samples
            else []
            for w in plan
        ]


def expected_answer(prompt: list[int], max_tokens: int, stop_ids: frozenset[int], min_tokens: int = 0) -> list[int]:
    """What plain decoding, one token at a time, gives."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_ids and len(tokens) - len(prompt) > min_tokens:
            break
    return tokens[len(prompt) :]
