"""What Cog's server costs: tokens per second over HTTP against the engine's own.

    python -m bench.serving --weights weights/demo

Both are loaded with the settings from this process's environment, and take turns on the same requests. The figure that
counts is the ratio.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.command import checkpoint, report_errors
from starling.client import Client
from starling.local_server import LocalServer
from starling.request import Request
from starling.service import Service
from starling.settings import Settings

TOKENS = 128  # per answer
ROUNDS = 5
CONCURRENCIES = (1, 8, 32)
Ask = Callable[[dict[str, Any]], float]  # inputs → seconds to the first chunk


def through_server(client: Client) -> Ask:
    def ask(inputs: dict[str, Any]) -> float:
        began_s = time.perf_counter()
        first_s = 0.0
        with client.stream(**inputs) as answer:
            for _ in answer:
                first_s = first_s or time.perf_counter() - began_s
        return first_s

    return ask


def through_engine(service: Service) -> Ask:
    def ask(inputs: dict[str, Any]) -> float:
        began_s = time.perf_counter()
        first_s = 0.0
        for _ in service.generate(Request.parse(**inputs)):
            first_s = first_s or time.perf_counter() - began_s
        return first_s

    return ask


def measure(ask: Ask, concurrency: int, turn: int) -> tuple[float, float]:
    """Tokens per second over all streams, and the median time to the first chunk in seconds."""
    inputs = [
        {"prompt": f"{turn} {i}: tell me a story.", "seed": i, "min_tokens": TOKENS, "max_tokens": TOKENS}
        for i in range(concurrency)
    ]
    began_s = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        first = list(pool.map(ask, inputs))
    return concurrency * TOKENS / (time.perf_counter() - began_s), statistics.median(first)


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=checkpoint, required=True, help="a checkpoint folder")
    parser.add_argument("--engine", choices=("engine", "reference"), help="in both (default: STARLING_ENGINE)")
    options = parser.parse_args()
    environ = {"STARLING_WEIGHTS": str(options.weights.resolve()), "COG_MAX_CONCURRENCY": str(max(CONCURRENCIES))}
    environ |= {"STARLING_ENGINE": options.engine} if options.engine else {}
    service = Service.from_folder(options.weights, Settings.from_env(os.environ | environ))
    began_s = time.perf_counter()
    with LocalServer(environ=environ) as server:
        print(f"server ready after {time.perf_counter() - began_s:.1f} s")
        client = Client(server.url)
        ways = {"engine": through_engine(service), "server": through_server(client)}
        for concurrency in CONCURRENCIES:
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for turn in range(ROUNDS + 1):
                for name, ask in ways.items():
                    figures = measure(ask, concurrency, turn)
                    if turn > 0:  # the first round warms up
                        found[name].append(figures)
            (engine_rate, engine_first), (rate, first) = (
                tuple(statistics.median(column) for column in zip(*found[name], strict=True)) for name in ways
            )
            print(
                f"concurrency {concurrency:>2}   engine {engine_rate:7.1f} tokens/s, first {engine_first * 1e3:6.1f} ms"
                f"   server {rate:7.1f} tokens/s, first {first * 1e3:6.1f} ms   ratio {rate / engine_rate:.2f}"
            )
        client.close()
    service.close()


if __name__ == "__main__":
    main()
