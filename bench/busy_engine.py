"""An engine that decodes answers while it prefills a prompt: how much either slows the other down."""

import time

import torch

from starling.engine.cache import BlockCache
from starling.engine.engine import Engine, TokenStream
from starling.engine.runner import Runner
from starling.engine.scheduler import Limits, Scheduler
from starling.engine.sequence import SamplingParams
from starling.model.mistral import Mistral

PROMPT = 512  # tokens
ANSWER_PROMPT = 16  # tokens, before each answer
BLOCK = 16
HANG_AFTER_S = 120


class BusyEngine:
    """An engine over `model` that keeps decoding `streams` answers."""

    def __init__(self, model: Mistral, prefill_tokens: int, streams: int) -> None:
        config, longest = model.config, 2 * PROMPT
        cache = model.allocate_cache((streams + 1) * (longest // BLOCK + 1), BLOCK)
        limits = Limits(streams + 1, prefill_tokens, speculative_rows=0)
        books = BlockCache(cache.blocks, BLOCK, streams + 1, longest, config.sliding_window)
        runner = Runner(model, cache, books)
        self._engine = Engine(Scheduler(books, limits), runner, longest, config.vocab_size, HANG_AFTER_S)
        self._vocabulary = config.vocab_size
        self._streams = [self._submit(ANSWER_PROMPT, PROMPT) for _ in range(streams)]

    def prefill_prompt(self) -> tuple[float, list[float]]:
        """Submit a prompt: seconds to its first token, and between the tokens that one answer gets meanwhile."""
        stream = self._streams[-1]
        while stream.get(0) is not None:
            pass
        stream.get()
        began_s = last_s = time.perf_counter()
        prompt, gaps = self._submit(PROMPT, 1), []
        while prompt.get(0) is None:
            stream.get()
            gaps.append(time.perf_counter() - last_s)
            last_s += gaps[-1]
        return last_s - began_s, gaps

    def close(self) -> None:
        self._engine.close()

    def _submit(self, prompt_tokens: int, max_tokens: int) -> TokenStream:
        prompt = torch.randint(3, self._vocabulary, (prompt_tokens,)).tolist()
        return self._engine.submit(prompt, SamplingParams(max_tokens, stop_ids=frozenset(), seed=0))
