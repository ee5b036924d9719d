"""Logits → tokens. What is drawn for a request depends on its seed and the position alone, never on the batch.

Penalties are those of the OpenAI API (presence, frequency: of generated tokens) and of CTRL (repetition: of prompt and
generated tokens; Keskar et al. 2019, section 4.1), applied as vLLM does: repetition, frequency, presence, then
temperature and the filters of `Ops.sample`.
"""

from dataclasses import dataclass

import numpy as np
import torch

from starling.engine.scheduler import Work
from starling.engine.sequence import Sequence
from starling.model.ops import Ops

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: the SplitMix64 mix (Steele et al. 2014) of seed and position."""
    x = (_mix(seed + 0x9E3779B97F4A7C15) + position * 0x9E3779B97F4A7C15) & _MASK
    return (_mix(x) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True)
class Sampler:
    ops: Ops

    def sample(self, logits: torch.Tensor, plan: list[Work]) -> list[list[int]]:
        """float32 [rows, V], a row for each sampling work and each of its drafts in order → tokens per work.

        `logits` may be changed in place.
        """
        sampling = [work for work in plan if work.samples]
        rows = sum(1 + len(work.drafts) for work in sampling)
        assert logits.shape[0] == rows
        settings = np.empty((5, rows), dtype=np.float64)
        row = 0
        for work in sampling:
            sequence, params = work.sequence, work.sequence.params
            for ahead in range(1 + len(work.drafts)):
                self._shape(logits[row], sequence, work.drafts[:ahead])
                position = len(sequence.tokens) + ahead
                settings[:, row] = (
                    params.temperature,
                    max(0, params.top_k),
                    params.top_p,
                    params.min_p,
                    uniform(params.seed, position) if params.temperature else 0.0,
                )
                row += 1
        temperature, top_k, top_p, min_p, draws = torch.from_numpy(settings)
        tokens = self.ops.sample(logits, temperature, top_k.long(), top_p, min_p, draws).tolist()
        result: list[list[int]] = []
        row = 0
        for work in plan:
            count = 1 + len(work.drafts) if work.samples else 0
            result.append(tokens[row : row + count])
            row += count
        return result

    def _shape(self, logits: torch.Tensor, sequence: Sequence, drafts: list[int]) -> None:
        """Apply bans, the grammar and penalties to one row [V], as if `drafts` had been generated."""
        params = sequence.params
        if params.penalized:
            _penalize(logits, sequence, drafts)
        constraint = sequence.constraint
        # Where a grammar leaves nothing but the end, min_tokens cannot hold.
        if sequence.generated + len(drafts) < params.min_tokens and not (constraint and constraint.finished):
            logits[list(params.stop_ids)] = -torch.inf
        if constraint is not None:
            words = torch.from_numpy(constraint.mask()).to(logits.device)
            bits = torch.arange(logits.numel(), device=logits.device)
            allowed = (words[bits >> 5] >> (bits & 31)) & 1
            logits.masked_fill_(allowed == 0, -torch.inf)


def _penalize(logits: torch.Tensor, sequence: Sequence, drafts: list[int]) -> None:
    params = sequence.params
    generated = sequence.tokens[sequence.prompt_length :] + drafts
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(sequence.tokens) | set(drafts)), device=logits.device)
        values = logits[seen]
        factor = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if generated and (params.frequency_penalty or params.presence_penalty):
        ids, counts = torch.unique(torch.tensor(generated, device=logits.device), return_counts=True)
        logits[ids] -= params.frequency_penalty * counts + params.presence_penalty
