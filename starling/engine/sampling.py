"""Logits → tokens. The random numbers of a request depend on its seed and the position alone, never on the batch.

Penalties are those of the OpenAI API (presence, frequency: over generated tokens) and of CTRL (repetition: over prompt
and generated tokens; Keskar et al. 2019, section 4.1), applied as vLLM does: repetition, frequency, presence, then
temperature and the filters of `Ops.sample`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from starling.engine.scheduler import Work
from starling.engine.sequence import SamplingParams, TokenConstraint

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: the SplitMix64 mix (Steele et al. 2014) of seed and position."""
    return (_mix(_stream(seed) + position * _GOLDEN) >> 11) * 2.0**-53


@lru_cache(maxsize=1024)  # called at every step for every sequence
def _stream(seed: int) -> int:
    return _mix(seed + _GOLDEN)


def _mix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True, slots=True)
class RowRules:
    """What changes one row of logits before a token is drawn from it, as known when the step starts."""

    row: int
    params: SamplingParams
    prompt: list[int]  # this and `generated`: for penalties; empty if there are none
    generated: list[int]
    banned: list[int]
    allowed: np.ndarray | None  # uint32 [ceil(V / 32)] from `permitted`, if there is a grammar

    def apply(self, logits: torch.Tensor) -> None:
        """Change float32 [rows, V] in place."""
        row = logits[self.row]
        if self.params.penalized:
            self._penalize(row)
        if self.banned:
            row[self.banned] = -torch.inf
        if self.allowed is not None:
            forbid(row, self.allowed)

    def _penalize(self, row: torch.Tensor) -> None:
        params = self.params
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(list({*self.prompt, *self.generated}), device=row.device)
            values = row[seen]
            factor = params.repetition_penalty
            row[seen] = torch.where(values > 0, values / factor, values * factor)
        if self.generated and (params.frequency_penalty or params.presence_penalty):
            ids, counts = torch.unique(torch.tensor(self.generated, device=row.device), return_counts=True)
            row[ids] -= params.frequency_penalty * counts + params.presence_penalty


def rules(plan: list[Work]) -> list[RowRules]:
    """Penalties, bans and grammars of a step's logit rows, as if the drafts before each had been generated."""
    found = []
    for row, work in ruled(plan):
        params, constraint = work.sequence.params, work.sequence.constraint
        below = rows_below_min_tokens(work)
        assert work.source < 0 or not (params.penalized or constraint), "these need every token known"
        for ahead in range(1 + len(work.drafts)):
            prompt, generated = _history(work, ahead) if params.penalized else ([], [])
            banned = list(params.stop_ids) if ahead < below else []
            allowed = None
            if constraint is not None:
                banned, allowed = [], permitted(constraint, banned)
            found.append(RowRules(row + ahead, params, prompt, generated, banned, allowed))
    return found


def ruled(plan: list[Work]) -> Iterator[tuple[int, Work]]:
    """The works whose logits are changed before a token is drawn, each with its first row of the step's logits."""
    row = 0
    for work in plan:
        if work.samples:
            params = work.sequence.params
            if params.penalized or params.min_tokens or work.sequence.constraint is not None:
                yield row, work
            row += 1 + len(work.drafts)


def rows_below_min_tokens(work: Work) -> int:
    """How many of the work's logit rows, from the first on, min_tokens keeps from ending the answer."""
    generated = work.start + work.count - work.sequence.prompt_length  # before the first row, in flight or not
    return max(0, min(1 + len(work.drafts), work.sequence.params.min_tokens - generated))


def permitted(constraint: TokenConstraint, banned: Iterable[int]) -> np.ndarray:
    """uint32 [ceil(V / 32)]: what the grammar allows except `banned`, or all of it if that leaves nothing.

    So min_tokens cannot keep an answer going that its grammar, or a fault in it, ends.
    """
    allowed = constraint.mask().view(np.uint32)
    rest = allowed.copy()
    clear(rest, banned)
    return rest if rest.any() else allowed


def clear(mask: np.ndarray, tokens: Iterable[int]) -> None:
    """Remove `tokens` from uint32 [ceil(V / 32)], in place."""
    for token in tokens:
        mask[token // 32] &= ~np.uint32(1 << token % 32)


def forbid(logits: torch.Tensor, allowed: np.ndarray) -> None:
    """Set float32 [..., V] to -inf, in place, for every token that is not in `allowed`, uint32 [ceil(V / 32)]."""
    words = torch.from_numpy(allowed.view(np.int32)).to(logits.device)
    bits = torch.arange(logits.shape[-1], device=logits.device)
    logits.masked_fill_((words[bits >> 5] >> (bits & 31)) & 1 == 0, -torch.inf)


def _history(work: Work, ahead: int) -> tuple[list[int], list[int]]:
    tokens, length = work.sequence.tokens, work.sequence.prompt_length
    return tokens[:length], tokens[length:] + work.drafts[:ahead]
