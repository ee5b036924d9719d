"""Runs a model by hand: sequences with block tables of their own, stepped together or alone."""

from dataclasses import dataclass, replace

import torch

from starling.model.batch import Batch
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral


@dataclass
class Sequence:
    """One request's place in the cache."""

    blocks: list[int]
    length: int = 0  # positions written


def step(model: Mistral, cache: KVCache, work: list[tuple[Sequence, list[int]]]) -> list[torch.Tensor]:
    """Append tokens to each sequence in one batch; returns each one's logits, float32 [its new tokens, V]."""
    with torch.inference_mode():
        logits = model.forward(batch_of(model, cache, work), cache)
    return list(logits.split([len(new) for _, new in work]))


def batch_of(model: Mistral, cache: KVCache, work: list[tuple[Sequence, list[int]]]) -> Batch:
    """Tokens appended to each sequence; the logits of all are wanted."""
    device, size = model.ops.device, cache.block_size
    window = model.config.sliding_window
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, tables = [0], []
    for sequence, new in work:
        at = range(sequence.length, sequence.length + len(new))
        tokens += new
        positions += at
        slots += [sequence.blocks[position // size] * size + position % size for position in at]
        starts.append(len(tokens))
        # Blocks that no query of this step can see are gone, as they are in the engine.
        passed = 0 if window is None else max(0, sequence.length - window + 1) // size
        tables.append([-1] * passed + sequence.blocks[passed:])
        sequence.length += len(new)
    width = max(len(table) for table in tables)

    def ints(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Batch(
        token_ids=torch.tensor(tokens, device=device),
        positions=ints(positions),
        slots=ints(slots),
        query_starts=ints(starts),
        context_lens=ints([sequence.length for sequence, _ in work]),
        block_tables=ints([table + [-1] * (width - len(table)) for table in tables]),
        # A decode step's token is a generated one; everything longer is a prompt.
        prompt_tokens=torch.tensor([len(new) > 1 for _, new in work for _ in new], device=device),
        logit_rows=torch.arange(len(tokens), device=device),
    )


def some_and_all(model: Mistral, prompts: list[list[int]], wanted: list[int]) -> list[torch.Tensor]:
    """Logits of the `wanted` tokens, alone and among all, for prompts of up to 32 tokens. The caches must be equal."""
    own, other = (model.allocate_cache(2 * len(prompts), 16) for _ in range(2))
    logits = []
    for cache in (own, other):
        cache.keys.zero_(), cache.values.zero_()
        work = [(Sequence([2 * i, 2 * i + 1]), prompt) for i, prompt in enumerate(prompts)]
        batch = batch_of(model, cache, work)
        if cache is own:
            batch = replace(batch, logit_rows=torch.tensor(wanted, dtype=torch.int64, device=model.ops.device))
        with torch.inference_mode():
            logits.append(model.forward(batch, cache))
    assert torch.equal(own.keys, other.keys) and torch.equal(own.values, other.values)
    return [logits[0], logits[1][wanted]]


def greedy(model: Mistral, prompt: list[int], max_tokens: int) -> list[int]:
    """The likeliest continuation, up to and including the token that ends it."""
    block_size = 16
    blocks = -(-(len(prompt) + max_tokens) // block_size)
    cache = model.allocate_cache(blocks, block_size)
    sequence, made, new = Sequence(list(range(blocks))), [], prompt
    while len(made) < max_tokens and not (made and made[-1] in model.config.eos_token_ids):
        (logits,) = step(model, cache, [(sequence, new)])
        new = [int(logits[-1].argmax())]
        made += new
    return made
