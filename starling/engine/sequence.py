"""One request as the engine knows it: its tokens, how far they are computed, and the blocks that hold them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from starling.engine.speculation import PromptLookup

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_TOP_K = 1 << 31  # larger than any vocabulary, and exact in a float64 and an int64


class TokenConstraint(Protocol):
    """Which tokens may come next in an answer that must follow a grammar. Owned by one sequence."""

    def mask(self) -> np.ndarray:
        """int32 [ceil(V / 32)]: bit t, counted across the words, says whether token t may come next. Never empty: the
        end may follow a complete answer, or a fault."""
        ...

    def advance(self, token: int) -> None: ...

    @property
    def fault(self) -> str | None:
        """Why the grammar cannot continue, if `advance` or `mask` found that it cannot; this request alone fails."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen. The layers above check the values; see starling/request.py for bounds."""

    max_tokens: int
    stop_ids: frozenset[int]
    seed: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def penalized(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @cached_property  # read at every step
    def filters(self) -> tuple[float, int, float, float]:
        """The arguments of Ops.sample besides the random number: temperature, top_k, top_p, min_p."""
        return self.temperature, min(max(0, self.top_k), MAX_TOP_K), self.top_p, self.min_p


class Sequence:
    """Mutable; only the engine's thread touches it."""

    __slots__ = (
        "arrival",
        "blocks",
        "cached",
        "computed",
        "constraint",
        "keys",
        "lookup",
        "max_size",
        "params",
        "prompt_length",
        "published",
        "row",
        "sampled_row",
        "settled",
        "tokens",
        "unknown",
    )

    def __init__(
        self,
        arrival: int,
        prompt: list[int],
        params: SamplingParams,
        constraint: TokenConstraint | None = None,
        lookup: PromptLookup | None = None,
    ) -> None:
        self.arrival = arrival  # order of submission; also the identity
        self.tokens = list(prompt)  # the prompt, then the generated tokens known so far
        self.unknown = 0  # further tokens, which steps in flight sample: one per step
        self.sampled_row = -1  # row of the last of those among the ids that its step samples
        self.prompt_length = len(prompt)
        self.max_size = len(prompt) + params.max_tokens  # tokens that it can grow to
        self.params = params
        self.constraint = constraint
        self.lookup = lookup
        self.computed = 0  # positions whose keys and values are in the cache once the steps in flight are done
        self.settled = 0  # those of them that completed steps have written
        self.blocks: list[int] = []  # one for each block_size positions; -1 once the window has passed it
        self.keys: list[bytes] = []  # content keys of the full blocks, computed as needed
        self.published = 0  # leading blocks that are offered for sharing
        self.row = -1  # row of the block-table array while running
        self.cached: int | None = None  # prompt tokens found in the cache before the first was computed

    @property
    def size(self) -> int:
        """Tokens it has, counting those in flight."""
        return len(self.tokens) + self.unknown

    @property
    def pending(self) -> int:
        """Tokens that the next steps must compute: 1 while decoding, 0 once its last token is in flight."""
        size = len(self.tokens) + self.unknown
        return (size if size < self.max_size else self.max_size - 1) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    def __repr__(self) -> str:
        return f"Sequence({self.arrival}, {self.computed}/{len(self.tokens)}+{self.unknown} of {self.max_size})"
