"""What the engine itself does: throughput by concurrency, its overhead per step, and what shared prefixes save.

    python -m bench.engine --weights weights/demo

Everything is measured in one run on one machine: compare the ratios within a run, not figures across machines.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.command import checkpoint, report_errors
from starling.engine.cache import BlockCache
from starling.engine.inputs import StepInputs
from starling.engine.scheduler import Limits, Scheduler, Work
from starling.engine.sequence import SamplingParams, Sequence
from starling.engine.speculation import PromptLookup
from starling.model.ops.cpu.cores import usable_cores
from starling.request import Request
from starling.service import Service
from starling.settings import Settings

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
TOKENS = 48  # per answer
ROUNDS = 3
BURST = 8  # requests


def throughput(service: Service) -> list[tuple[int, float]]:
    """Generated tokens per second by concurrency, medians of ROUNDS rounds. Answers differ; their lengths do not."""
    rates: dict[int, list[float]] = {n: [] for n in CONCURRENCIES}
    for turn in range(ROUNDS + 1):
        for concurrency in CONCURRENCIES:
            requests = [
                Request.parse(prompt=f"{turn} {i}: tell me a story.", seed=i, min_tokens=TOKENS, max_tokens=TOKENS)
                for i in range(concurrency)
            ]
            began_s = time.perf_counter()
            generations = [service.generate(request) for request in requests]
            for generation in generations:
                for _ in generation:
                    pass
            rate = concurrency * TOKENS / (time.perf_counter() - began_s)
            if turn > 0:  # the first round warms up
                rates[concurrency].append(rate)
    return [(concurrency, statistics.median(found)) for concurrency, found in rates.items()]


def overhead_us(batch: int, steps: int = 400) -> tuple[float, float]:
    """µs per decode step, medians, with a stub model: planning and completing it, and building the step's arrays."""
    books = BlockCache(4096, 16, batch, 2048, window=1024)
    scheduler = Scheduler(books, Limits(batch, prefill_tokens=512, speculative_rows=16))
    for i in range(batch):
        params = SamplingParams(max_tokens=1500, stop_ids=frozenset({0}), seed=i, temperature=1.0)
        scheduler.add(Sequence(i, [i + 5] * 40, params, lookup=PromptLookup()))

    def stub(plan: list[Work]) -> list[list[int]]:
        return [[work.start % 997 + 1] * (1 + len(work.drafts)) if work.samples else [] for work in plan]

    scheduling, building = [], []
    for _ in range(steps):
        t0 = time.perf_counter()
        plan = scheduler.plan()
        t1 = time.perf_counter()
        assert plan is not None
        StepInputs.of(plan, books)
        t2 = time.perf_counter()
        sampled = stub(plan)
        t3 = time.perf_counter()
        scheduler.complete(plan, sampled)
        t4 = time.perf_counter()
        scheduling.append(t1 - t0 + t4 - t3)
        building.append(t2 - t1)
    half = steps // 2  # the first half prefills and warms up
    return statistics.median(scheduling[half:]) * 1e6, statistics.median(building[half:]) * 1e6


def conversation(service: Service, turns: int = 10) -> list[tuple[int, int, float]]:
    """Per turn: prompt tokens, how many of them were cached, and seconds to the first token."""
    messages: list[dict[str, str]] = []
    found = []
    for turn in range(turns):
        prompt = f"Turn {turn}. " + "Tell me more about the river, the fox, and the other side. " * 4
        request = Request.parse(messages=messages, prompt=prompt, temperature=0, max_tokens=40)
        result = service.answer(request)
        found.append((result.input_token_count, result.cached_token_count, result.time_to_first_token))
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": result.text}]
    return found


def uncached(service: Service, prompt_tokens: int) -> float:
    """Seconds to the first token of a prompt of about that length, of which nothing is cached."""
    word = f"{time.perf_counter_ns()} "
    request = Request.parse(prompt=word + "fox river side " * (prompt_tokens // 3), max_tokens=1)
    return service.answer(request).time_to_first_token


def burst(service: Service, same: bool) -> list[tuple[float, int]]:
    """BURST requests at once, prompts equal or different from the start: seconds to first token, and cached tokens."""
    word = time.perf_counter_ns()
    requests = [
        Request.parse(prompt=f"{0 if same else i} {word} " + "The fox crossed the river. " * 80, max_tokens=8)
        for i in range(BURST)
    ]
    with ThreadPoolExecutor(BURST) as callers:
        results = list(callers.map(service.answer, requests))
    return [(result.time_to_first_token, result.cached_token_count) for result in results]


TEXTS = {
    "free text, sampled": {"prompt": "Tell me a story about a river.", "temperature": 1.2, "top_p": 1.0},
    "repeated text": {"prompt": "Repeat: " + "The fox crossed the river at night. " * 6, "temperature": 0},
}


def speculation(folder: Path) -> list[tuple[str, float, float]]:
    """Per kind of text: speedup by drafts (median of pairs measured in turn), and share of draft tokens accepted."""
    settings = [Settings(max_concurrency=1, speculative_rows=rows) for rows in (0, 8)]
    services = [Service.from_folder(folder, setting) for setting in settings]
    found = []
    for name, fields in TEXTS.items():
        ratios = []
        before = services[1].counters
        for seed in range(2 * ROUNDS + 1):
            request = Request.parse(seed=seed, min_tokens=128, max_tokens=128, **fields)
            plain, drafted = (service.answer(request) for service in services)
            assert plain.text == drafted.text, "a draft changed an answer"
            if seed > 0:
                ratios.append(drafted.tokens_per_second / plain.tokens_per_second)
        after = services[1].counters
        proposed = after.proposed - before.proposed
        found.append((name, statistics.median(ratios), (after.accepted - before.accepted) / max(1, proposed)))
    for service in services:
        service.close()
    return found


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--weights", type=checkpoint, action="append", required=True, help="a checkpoint folder; may be repeated"
    )
    options = parser.parse_args()
    print(f"{usable_cores()} cores · torch {torch.__version__}\n")

    print("Overhead per decode step, the model stubbed (µs, medians)")
    for batch in (1, 8, 32):
        scheduling, building = overhead_us(batch)
        print(f"  batch {batch:>2}   plan and complete {scheduling:6.0f}   build arrays {building:6.0f}")

    for folder in options.weights:
        service = Service.from_folder(folder, Settings(max_concurrency=max(CONCURRENCIES)))
        print(f"\n{folder}: generated tokens per second, {TOKENS} per answer, median of {ROUNDS} rounds")
        rates = throughput(service)
        for concurrency, rate in rates:
            print(f"  concurrency {concurrency:>2}   {rate:8.1f} tokens/s   {rate / rates[0][1]:5.2f} x one stream")
        print(f"{folder}: a conversation of 10 turns")
        for turn, (prompt, cached, first_s) in enumerate(conversation(service)):
            print(f"  turn {turn}   prompt {prompt:>5}   cached {cached:>5}   first token {first_s * 1e3:7.1f} ms")
        print(f"  the last turn's prompt, with nothing cached: {uncached(service, prompt) * 1e3:.1f} ms")
        print(f"{folder}: {BURST} requests at once")
        for same in (True, False):
            found = burst(service, same)
            firsts = [first_s * 1e3 for first_s, _ in found]
            kind, cached = "the same prompt" if same else "different ones", sum(cached for _, cached in found)
            print(
                f"  {kind:<15}   first token {statistics.mean(firsts):7.1f} ms, the last {max(firsts):7.1f} ms   "
                f"cached {cached:>5}"
            )
        service.close()
        print(f"{folder}: speculative decoding by prompt lookup, one stream")
        for name, ratio, share in speculation(folder):
            print(f"  {name:<20} {ratio:5.2f} x plain decoding   {share:4.0%} of draft tokens accepted")


if __name__ == "__main__":
    main()
