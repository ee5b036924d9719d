"""Load-test a running server: many requests with random parameters, some cancelled, some whose caller disconnects.

    python -m bench.load --url http://127.0.0.1:5000 --requests 1000 --concurrency 32 --seed 0

Prints percentiles of latency and of the time to the first chunk, throughput, outcomes and failures. The exit code is 1
if a request hung or failed unexpectedly. An address that is not this machine's needs --remote: load only what is yours.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from httpx_sse import EventSource

from bench.command import count
from starling.client import LOOPBACK_WITHOUT_PROXY

WORDS = [
    "tell",
    "me",
    "about",
    "a",
    "small",
    "red",
    "fox",
    "that",
    "crossed",
    "the",
    "river",
    "at",
    "night",
    "and",
    "what",
    "it",
    "found",
    "on",
    "the",
    "other",
    "side",
]
Fate = Literal["finish", "cancel", "disconnect"]
TIMEOUT_S = 300.0  # for a slot, and for the next event
CANCELLED_TOKENS = 1000  # of an answer to be cancelled: long enough to be unfinished when the cancellation arrives


@dataclass
class Tally:
    """The outcomes of all requests. Times in seconds."""

    outcomes: Counter[str] = field(default_factory=Counter)
    total_s: list[float] = field(default_factory=list)
    first_chunk_s: list[float] = field(default_factory=list)
    tokens: int = 0
    failures: list[str] = field(default_factory=list)


def random_inputs(dice: random.Random, max_tokens: int) -> dict[str, Any]:
    """A valid request of random length and parameters."""
    prompt = " ".join(dice.choices(WORDS, k=dice.choice((1, 5, 20, 100, 300))))
    inputs: dict[str, Any] = {
        "prompt": prompt,
        "mode": dice.choice(("chat", "code")),
        "max_tokens": dice.randint(1, max_tokens),
        "temperature": dice.choice((0, 0.7, 1.5)),
        "top_p": dice.choice((1.0, 0.95, 0.5)),
        "top_k": dice.choice((-1, 0, 1, 40)),
        "min_p": dice.choice((0.0, 0.1)),
        "presence_penalty": dice.choice((0.0, 0.5)),
        "frequency_penalty": dice.choice((0.0, -0.5)),
        "repetition_penalty": dice.choice((1.0, 1.2)),
    }
    if dice.random() < 0.3:
        inputs["stop_sequences"] = json.dumps(dice.choices(["the", "\n\n", "fox, red", "。"], k=2))
    if dice.random() < 0.3:
        inputs["seed"] = dice.randint(0, 10)
    if dice.random() < 0.3:
        inputs["system_prompt"] = "You are brief."
    if dice.random() < 0.1:
        inputs["json_schema"] = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
    return inputs


async def send(client: httpx.AsyncClient, inputs: dict[str, Any], fate: Fate, after: int, tally: Tally) -> None:
    """Send one request. After `after` chunks it is cancelled, or the caller disconnects, if that is its fate."""
    headers = {"Accept": "text/event-stream"}
    began_s = time.monotonic()
    while True:
        async with client.stream("POST", "/predictions", json={"input": inputs}, headers=headers) as response:
            # A slot is freed slightly after its answer has ended. Other callers may hold them all for longer.
            if response.status_code == httpx.codes.CONFLICT and time.monotonic() - began_s < TIMEOUT_S:
                await response.aread()
                await asyncio.sleep(0.02)
                continue
            if response.status_code != httpx.codes.OK:
                tally.outcomes["refused"] += 1
                tally.failures.append(f"{response.status_code} {(await response.aread()).decode()[:200]}")
                return
            await read(client, response, fate, after, began_s, tally)
            return


async def read(
    client: httpx.AsyncClient, response: httpx.Response, fate: Fate, after: int, began_s: float, tally: Tally
) -> None:
    chunks, prediction, cancelled = 0, "", False
    async for event in EventSource(response).aiter_sse():
        data = json.loads(event.data)
        if event.event == "start":
            prediction = data["id"]
        elif event.event == "output":
            chunks += 1
            if chunks == 1:
                tally.first_chunk_s.append(time.monotonic() - began_s)
        elif event.event == "completed":
            tally.outcomes[data["status"]] += 1
            if data["status"] == "failed":
                tally.failures.append(f"{data.get('error')}"[:200] + (" (cancelled)" if cancelled else ""))
            elif data["status"] == "succeeded":
                tally.total_s.append(time.monotonic() - began_s)
                if "output_token_count" not in data["metrics"]:
                    tally.failures.append("an answer came without metrics")
                tally.tokens += data["metrics"].get("output_token_count", 0)
            return
        if chunks >= after and fate == "disconnect":
            tally.outcomes["disconnected"] += 1
            return
        if chunks >= after and fate == "cancel" and prediction:
            await client.post(f"/predictions/{prediction}/cancel")
            fate, cancelled = "finish", True
    tally.outcomes["truncated"] += 1
    tally.failures.append("the stream ended without a final event")


async def load(url: str, requests: int, concurrency: int, max_tokens: int, seed: int, abuse: float) -> Tally:
    """`abuse`: the share of requests that are cancelled or whose caller disconnects."""
    tally = Tally()
    dice = random.Random(seed)
    plan = []
    for _ in range(requests):
        fate: Fate = dice.choice(("cancel", "disconnect")) if dice.random() < abuse else "finish"
        inputs = random_inputs(dice, max_tokens)
        if fate == "cancel":
            inputs |= {"min_tokens": CANCELLED_TOKENS, "max_tokens": CANCELLED_TOKENS}
        plan.append((inputs, fate, dice.randint(0, 5)))
    queue = iter(plan)
    limits = httpx.Limits(max_connections=2 * concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_S, limits=limits, mounts=LOOPBACK_WITHOUT_PROXY
    ) as client:

        async def worker() -> None:
            for inputs, fate, after in queue:
                try:
                    await send(client, inputs, fate, after, tally)
                except httpx.HTTPError as error:
                    tally.outcomes["broken"] += 1
                    tally.failures.append(f"{type(error).__name__}: {error}")

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return tally


def report(tally: Tally, seconds: float) -> str:
    def spread(values: list[float]) -> str:
        if len(values) < 2:
            return "too few values"
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        return f"p50 {cuts[49]:.3f} s · p90 {cuts[89]:.3f} s · p99 {cuts[98]:.3f} s · most {max(values):.3f} s"

    lines = [
        f"outcomes     {dict(tally.outcomes)}",
        f"latency      {spread(tally.total_s)}",
        f"first chunk  {spread(tally.first_chunk_s)}",
        f"throughput   {sum(tally.outcomes.values()) / seconds:.2f} requests/s, {tally.tokens / seconds:.1f} tokens/s",
        f"failures     {len(tally.failures)}",
    ]
    return "\n".join(lines + [f"  {count} x {text}" for text, count in Counter(tally.failures).most_common(10)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:5000", help="the server's address (default: %(default)s)")
    parser.add_argument("--remote", action="store_true", help="allow an address that is not this machine's")
    parser.add_argument("--requests", type=count, default=1000, help="in all (default: %(default)s)")
    parser.add_argument("--concurrency", type=count, default=32, help="requests at once (default: %(default)s)")
    parser.add_argument("--max-tokens", type=count, default=64, help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--abuse", type=float, default=0.3, help="share of requests cancelled or disconnected")
    parser.add_argument("--seed", type=int, default=0, help="of the random requests (default: %(default)s)")
    options = parser.parse_args()
    try:
        host = httpx.URL(options.url).host
    except httpx.InvalidURL as error:
        parser.error(f"{options.url} is not a valid address: {error}")
    if host not in ("127.0.0.1", "localhost", "::1") and not options.remote:
        parser.error(f"{options.url} is not this machine; add --remote if it is yours to load")
    began_s = time.monotonic()
    tally = asyncio.run(
        load(options.url, options.requests, options.concurrency, options.max_tokens, options.seed, abuse=options.abuse)
    )
    print(report(tally, time.monotonic() - began_s))
    return 1 if tally.failures or sum(tally.outcomes.values()) != options.requests else 0


if __name__ == "__main__":
    sys.exit(main())
