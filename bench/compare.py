"""Our engine against the reference on one checkpoint, the two taking turns in one run: the ratios.

    python -m bench.compare --weights weights/demo

Each engine runs in a process of its own, so that neither pays for the other's memory. Every figure is the median over
the rounds. Compare the ratios: the figures themselves hold for this machine at this moment only.
"""

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.command import checkpoint, count, report_errors
from starling.model.ops.cpu.cores import usable_cores
from starling.request import Request
from starling.service import Service
from starling.settings import Settings

ENGINES = ("engine", "reference")
CONCURRENCIES = (1, 4, 16)
WORDS = {"short prompt": 20, "long prompt": 500}
TOKENS = 32  # per answer


def measure(folder: Path, engine: str, seed: int) -> dict[str, float]:
    """One engine's figures, measured in this process. Prompts depend on `seed`, so that none is found in a cache."""
    began_s = time.perf_counter()
    settings = Settings.model_validate({"engine": engine, "max_concurrency": max(CONCURRENCIES)})
    service = Service.from_folder(folder, settings)
    figures = {"start-up, s": time.perf_counter() - began_s}
    service.answer(_request(seed, 0, 20, 4))  # warms up
    for name, words in WORDS.items():
        results = [service.answer(_request(seed, 10 + i, words, TOKENS)) for i in range(3)]
        figures[f"first token, {name}, s"] = statistics.median(result.time_to_first_token for result in results)
        figures[f"tokens/s, {name}"] = statistics.median(result.tokens_per_second for result in results)
    for concurrency in CONCURRENCIES:
        began_s = time.perf_counter()
        generations = [service.generate(_request(seed, 100 * concurrency + i, 20, TOKENS)) for i in range(concurrency)]
        for generation in generations:
            for _ in generation:
                pass
        seconds = time.perf_counter() - began_s
        figures[f"throughput at {concurrency}, tokens/s"] = concurrency * TOKENS / seconds
    figures["peak memory, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if torch.cuda.is_available():
        figures["peak GPU memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    service.close()
    return figures


def _request(seed: int, number: int, words: int, tokens: int) -> Request:
    text = f"{seed} {number}: tell me a story of a fox and a river. " + "fox river side " * (words // 3)
    return Request.parse(prompt=text, seed=number, min_tokens=tokens, max_tokens=tokens)


def compare(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """The median of each engine's figures over `rounds`, in which the engines take turns."""
    found: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for turn in range(rounds):
        for engine in ENGINES:
            command = [sys.executable, "-m", "bench.compare", "--weights", str(folder), "--only", engine]
            done = subprocess.run([*command, "--seed", str(turn)], stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.returncode)  # its message is above
            found[engine].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1} of {rounds}: {engine} done", file=sys.stderr)
    return {
        engine: {name: statistics.median(figures[name] for figures in rounds_of) for name in rounds_of[0]}
        for engine, rounds_of in found.items()
    }


def report(found: dict[str, dict[str, float]]) -> str:
    lines = [f"{'':<32} {'ours':>9} {'reference':>10} {'ratio':>8}"]
    for name, ours in found["engine"].items():
        reference = found["reference"][name]
        # The ratio says how many times better ours is: more tokens, or less time and memory.
        ratio = ours / reference if "tokens/s" in name else reference / ours
        lines.append(f"{name:<32} {ours:>9.3f} {reference:>10.3f} {ratio:>7.2f}x")
    return "\n".join(lines)


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=checkpoint, required=True, help="an AWQ checkpoint folder")
    parser.add_argument("--rounds", type=count, default=3, help="to take the medians over (default: %(default)s)")
    parser.add_argument("--only", choices=ENGINES, help="measure one engine in this process, and print JSON")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.weights, options.only, options.seed)))
        return
    import transformers

    today = datetime.datetime.now(tz=datetime.UTC).date()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{usable_cores()} cores"
    versions = f"torch {torch.__version__} · transformers {transformers.__version__} · {platform.python_version()}"
    print(f"{today} · {options.weights} · {device} · {versions} · {options.rounds} rounds, {TOKENS} tokens per answer")
    print("The reference answers one request at a time; ours batches them.\n")
    print(report(compare(options.weights, options.rounds)))


if __name__ == "__main__":
    main()
