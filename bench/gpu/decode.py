"""Decoding as the engine does it, the host one step behind, over a random KV cache that counts as computed."""

import random
import time
from dataclasses import dataclass

import torch

from bench.gpu.clock import Clock
from starling.engine.cache import BlockCache
from starling.engine.graph_runner import GraphRunner
from starling.engine.runner import Step
from starling.engine.scheduler import Limits, Scheduler, Work
from starling.engine.sequence import SamplingParams, Sequence
from starling.engine.speculation import PromptLookup
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral
from starling.model.ops.cuda import CudaOps
from starling.settings import Settings

PREFILL_TOKENS = CudaOps.prefill_tokens
WARM_UP = 4  # steps; the first is the one that is captured
ROWS = Settings().speculative_rows  # of a step with drafts
LOWEST_ID = 3  # ids below are special tokens


@dataclass(frozen=True)
class StepTimes:
    wall_s: float  # from result to result
    host_s: float  # the part of it in which the host did not wait
    first_s: float  # the first step of this size, which includes the capture


class AlwaysDrafting(PromptLookup):
    """Drafts for every step, and learns nothing from being wrong."""

    def draft(self, tokens: list[int], limit: int) -> list[int]:
        return [LOWEST_ID] * limit

    def learn(self, proposed: int, accepted: int, size: int) -> None:
        pass


class Decoding:
    """Up to `max_running` sequences over `cache`, whose content is random."""

    def __init__(self, model: Mistral, cache: KVCache, max_running: int, seed: int = 0) -> None:
        config = model.config
        self.model, self.cache, self.max_running = model, cache, max_running
        self._clock = Clock(model.ops.device)
        self._random = random.Random(seed)
        limits = Limits(max_running=max_running, prefill_tokens=PREFILL_TOKENS, speculative_rows=ROWS)
        books = BlockCache(
            cache.blocks, cache.block_size, max_running, config.max_position_embeddings, config.sliding_window
        )
        self.runner = GraphRunner(model, cache, books, limits)
        self.scheduler = Scheduler(books, limits, self.runner.device_counts)
        self._in_flight: tuple[list[Work], Step] | None = None
        self._arrivals = 0
        self.waited_s = 0.0

    def add(self, requests: int, computed: int, drafting: bool = False) -> None:
        """Add sequences whose first `computed` tokens count as computed: they decode from the next step on."""
        books = self.scheduler.cache
        for _ in range(requests):
            sequence = self._sequence(computed + 1, AlwaysDrafting() if drafting else None)
            books.admit(sequence)
            assert books.grow(sequence, computed + 1), "the KV cache is too small for this measurement"
            sequence.computed = sequence.settled = computed
            books.advance(sequence)  # frees the blocks that the window has passed
            self.scheduler.running.append(sequence)

    def add_prompt(self, tokens: int) -> None:
        """Add a sequence whose prompt is not computed yet."""
        self.scheduler.add(self._sequence(tokens))

    def step(self) -> None:
        """Start the next step, then collect the result of the one before, as the engine's loop does."""
        plan = self.scheduler.plan()
        if not plan:  # it depends on that result
            self.collect()
            plan = self.scheduler.plan()
        assert plan
        flight = (plan, self.runner.start(plan))
        self.collect()
        self._in_flight = flight

    def collect(self) -> None:
        """Collect the result of the step in flight, if there is one."""
        if self._in_flight is not None:
            plan, step = self._in_flight
            self._in_flight = None
            began_s = time.perf_counter()
            result = step.result()
            self.waited_s += time.perf_counter() - began_s
            self.scheduler.complete(plan, result)

    def clear(self) -> None:
        self.collect()
        for sequence in list(self.scheduler.running):
            self.scheduler.remove(sequence)

    def measure(self, requests: int, context: int, steps: int = 64, drafting: bool = False) -> StepTimes:
        """Time steps that end with `context` tokens in the cache for each of `requests` sequences, more if drafts are
        accepted. With `drafting`, a step has ROWS tokens, and waits for the result of the one before."""
        steps = min(steps, context - WARM_UP - 1)
        assert steps > 0
        self.add(requests, context - steps - WARM_UP, drafting)
        began_s = time.perf_counter()
        self.step()
        self.collect()
        first_s = time.perf_counter() - began_s
        for _ in range(WARM_UP - 1):
            self.step()
        self._clock.wait()
        self.waited_s = 0.0
        began_s = time.perf_counter()
        for _ in range(steps):
            self.step()
        wall_s = (time.perf_counter() - began_s) / steps
        host_s = wall_s - self.waited_s / steps
        self.clear()
        return StepTimes(wall_s, host_s, first_s)

    def device_s(self, requests: int) -> float:
        """Seconds of the latest step of `requests` sequences on the device, replayed again and again."""
        return self._clock.median(lambda: self.runner.replay(requests))

    def _sequence(self, tokens: int, lookup: PromptLookup | None = None) -> Sequence:
        self._arrivals += 1
        # Sampled as the service does by default: greedy decoding would skip half of the sampling.
        params = SamplingParams(
            max_tokens=self.model.config.max_position_embeddings - tokens,
            stop_ids=frozenset(),
            seed=self._arrivals,
            temperature=0.7,
            top_p=0.95,
        )
        prompt = random_tokens(self._random, self.model.config.vocab_size, tokens)
        return Sequence(self._arrivals, prompt, params, lookup=lookup)


def random_tokens(source: random.Random, vocabulary: int, count: int) -> list[int]:
    return [source.randrange(LOWEST_ID, vocabulary) for _ in range(count)]


def filled_cache(model: Mistral, blocks: int, block_size: int = 16) -> KVCache:
    """Random keys and values: zeros are no realistic input to attention, and could be faster."""
    cache = model.allocate_cache(blocks, block_size)
    with torch.inference_mode():
        for storage in (*cache.keys, *cache.values):
            storage.normal_()
    return cache


def step_bytes(model: Mistral, weights: int, requests: int, context: int) -> int:
    """The least that a decode step reads: `weights` bytes once, and each sequence's keys and values."""
    config = model.config
    seen = min(context, config.sliding_window or context)
    return weights + requests * seen * KVCache.bytes_per_block(config, 1, model.ops.kv_dtype)
