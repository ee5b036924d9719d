"""Our sampling parameters as transformers' logits processors, in the order of `starling/engine/sampling.py`."""

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from starling.engine.sampling import forbid, permitted, uniform
from starling.engine.sequence import SamplingParams, TokenConstraint


def processors(prompt_length: int, params: SamplingParams, constraint: TokenConstraint | None) -> LogitsProcessorList:
    """What the model's logits pass through before generate chooses the likeliest remaining token."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        chain.append(CountPenalties(prompt_length, params))
    if constraint is not None:
        chain.append(Grammar(prompt_length, params, constraint))
    elif params.min_tokens:
        ends = sorted(params.stop_ids)
        chain.append(MinNewTokensLengthLogitsProcessor(prompt_length, params.min_tokens, ends))
    if params.temperature:
        chain.append(
            Temperature(max(float(params.temperature), torch.finfo(torch.float32).tiny))
        )  # smaller ones count as 0
        if params.min_p > 0:
            chain.append(MinPLogitsWarper(params.min_p))
        if params.top_k > 0:
            chain.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            chain.append(TopPLogitsWarper(params.top_p))
        chain.append(Draw(params.seed))
    return chain


class CountPenalties(LogitsProcessor):
    """The OpenAI API's presence and frequency penalties, over generated tokens; transformers has neither."""

    def __init__(self, prompt_length: int, params: SamplingParams) -> None:
        self._prompt_length = prompt_length
        self._params = params

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids, counts = torch.unique(input_ids[0, self._prompt_length :], return_counts=True)
        scores[0, ids] -= self._params.frequency_penalty * counts + self._params.presence_penalty
        return scores


class Temperature(TemperatureLogitsWarper):
    """Divides the distances to the largest logit, so that even the smallest temperature leaves one logit finite."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        warmed: torch.Tensor = super().__call__(input_ids, scores - scores.max())
        return warmed


class Grammar(LogitsProcessor):
    """Leaves only tokens that the grammar allows next; before min_tokens, no stop ids unless nothing else is left."""

    def __init__(self, prompt_length: int, params: SamplingParams, constraint: TokenConstraint) -> None:
        self._first_end = prompt_length + params.min_tokens
        self._stop_ids = params.stop_ids
        self._constraint = constraint

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        banned = self._stop_ids if input_ids.shape[1] < self._first_end else ()
        scores = scores.clone()
        forbid(scores, permitted(self._constraint, banned))
        return scores


class Draw(LogitsProcessor):
    """Draws a token with the engine's uniform number for this seed and position, and leaves only that one.

    generate would draw from torch's global generator, which every request shares.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mass = scores[0].to(torch.float64).softmax(dim=-1).cumsum(0)
        token = (mass > uniform(self._seed, input_ids.shape[1]) * mass[-1]).to(torch.uint8).argmax()
        drawn = torch.full_like(scores, -torch.inf)
        drawn[0, token] = 0
        return drawn
