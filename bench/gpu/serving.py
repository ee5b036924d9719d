"""Requests to an engine, as the service sends them: seconds to the first token, and tokens per second."""

import random
import statistics
import time
from typing import Protocol

from bench.gpu.decode import PREFILL_TOKENS, random_tokens
from starling.engine.cache import BlockCache
from starling.engine.engine import Engine, TokenStream
from starling.engine.graph_runner import GraphRunner
from starling.engine.scheduler import Limits, Scheduler
from starling.engine.sequence import SamplingParams, TokenConstraint
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral

TIMEOUT_S = 120.0


class TokenEngine(Protocol):
    """Ours, or the one that it is compared with."""

    def submit(
        self, prompt: list[int], params: SamplingParams, constraint: TokenConstraint | None = None
    ) -> TokenStream: ...


class Callers:
    """Sends prompts of random tokens; no two share a prefix, so nothing is found in a cache."""

    def __init__(self, engine: TokenEngine, vocabulary: int, seed: int = 0) -> None:
        self._engine, self._vocabulary = engine, vocabulary
        self._random = random.Random(seed)

    def first_token_s(self, prompt_tokens: int, rounds: int = 5) -> float:
        """Median time from submission to first delivery, after one round that does not count."""
        found = []
        for _ in range(rounds + 1):
            began_s = time.perf_counter()
            stream = self._send(prompt_tokens, 1)
            _take(stream)
            found.append(time.perf_counter() - began_s)
        return statistics.median(found[1:])

    def throughput(self, concurrency: int, prompt_tokens: int, tokens: int) -> tuple[float, float]:
        """Tokens per s of `concurrency` answers at once, including the time for their prompts; and seconds in all."""
        began_s = time.perf_counter()
        streams = [self._send(prompt_tokens, tokens) for _ in range(concurrency)]
        count = sum(_drain(stream) for stream in streams)
        seconds = time.perf_counter() - began_s
        assert count == concurrency * tokens
        return count / seconds, seconds

    def _send(self, prompt_tokens: int, tokens: int) -> TokenStream:
        prompt = random_tokens(self._random, self._vocabulary, prompt_tokens)
        params = SamplingParams(
            max_tokens=tokens,
            min_tokens=tokens,
            stop_ids=frozenset(),
            seed=self._random.randrange(2**32),
            temperature=0.7,
            top_p=0.95,
        )
        return self._engine.submit(prompt, params)


def own_engine(model: Mistral, cache: KVCache, max_running: int) -> Engine:
    """Without speculative decoding: the output of random weights repeats itself, and too many drafts would be right."""
    config = model.config
    limits = Limits(max_running=max_running, prefill_tokens=PREFILL_TOKENS, speculative_rows=0)
    books = BlockCache(
        cache.blocks, cache.block_size, max_running, config.max_position_embeddings, config.sliding_window
    )
    runner = GraphRunner(model, cache, books, limits)
    scheduler = Scheduler(books, limits, runner.device_counts)
    return Engine(scheduler, runner, config.max_position_embeddings, config.vocab_size, hang_after_s=TIMEOUT_S)


def _drain(stream: TokenStream) -> int:
    count = 0
    while True:
        tokens, ended = _take(stream)
        count += tokens
        if ended:
            return count


def _take(stream: TokenStream) -> tuple[int, bool]:
    delivery = stream.get(TIMEOUT_S)
    if delivery is None:
        raise TimeoutError(f"No token in {TIMEOUT_S:.0f} s.")
    if delivery.error is not None:
        raise delivery.error
    return len(delivery.tokens), delivery.finish is not None
