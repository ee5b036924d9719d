"""What the host costs a GPU: the share of the device's full speed that is left with the engine, and with the text too.

    python -m bench.host --weights weights/demo

The device is simulated by a clock: each step takes a fixed time, while the host plans, prepares and delivers as it does
for a GPU. So no GPU is needed, and no forward pass is computed; the driver's own calls are a fixed time too. Only the
tokenizer and the sizes are read from the checkpoint.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.command import checkpoint, report_errors
from starling.engine.cache import BlockCache
from starling.engine.engine import Engine
from starling.engine.frame import HOST_BUFFERS, Frame, Shape, Upload
from starling.engine.graph_runner import SIZES
from starling.engine.inputs import StepInputs, split
from starling.engine.runner import Step
from starling.engine.scheduler import Limits, Scheduler, Work
from starling.engine.sequence import SamplingParams
from starling.engine.shaping import Shaping
from starling.garbage import frozen_heap
from starling.model.config import ModelConfig
from starling.model.ops.cpu.cores import usable_cores
from starling.model.ops.cuda import CudaOps
from starling.request import Request
from starling.service import Service
from starling.tokenizer import Tokenizer

STEPS_MS = {1: 1.7, 8: 2.0, 32: 2.5, 64: 3.5}  # by concurrency: as predicted for the full-size model on an H100
LAUNCH_S = 40e-6  # the driver's calls, which hold Python's GIL
TOKENS = 512  # per answer
ROUNDS = 5
TIMEOUT_S = 60.0
POSITIONS = 8192
MASK_WORDS = 1  # no request here has a grammar mask


@dataclass(frozen=True)
class PendingStep:
    plan: list[Work]
    tokens: list[int]
    at_s: float

    def result(self) -> list[list[int]]:
        left_s = self.at_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)
        return split(self.plan, self.tokens)


class ClockRunner:
    """Runs steps in the order in which they are started, each for `step_s`, and draws ids from `tokens`."""

    overlaps = True
    device_counts = True

    def __init__(self, books: BlockCache, limits: Limits, tokens: list[int], step_s: float) -> None:
        self._books, self._tokens, self._step_s = books, np.array(tokens), step_s
        self._blocks = books.tables.shape[1]
        rows = limits.max_running + limits.speculative_rows
        shape = Shape(limits.prefill_tokens + rows, rows, self._blocks, rows)
        self._upload = Upload(torch.device("cpu"), Frame(shape).size)
        self._frames: dict[int, Frame] = {}
        self._shaping = Shaping(lambda row, tokens, prompt_length: None)
        self._masks = np.zeros((rows, MASK_WORDS), dtype=np.uint32)
        self._random = np.random.default_rng(0)
        self._turn = 0
        self._end_s = 0.0

    def start(self, plan: list[Work]) -> Step:
        inputs = StepInputs.of(plan, self._books)
        self._turn = (self._turn + 1) % HOST_BUFFERS
        frame = self._frame(plan, inputs)
        frame.write(self._turn, inputs)
        host = frame.host[self._turn]
        self._shaping.write(plan, inputs, host["settings"], host["tail"], self._masks)
        launched_s = time.perf_counter() + LAUNCH_S
        while (now_s := time.perf_counter()) < launched_s:
            pass
        self._end_s = max(now_s, self._end_s) + self._step_s
        drawn = self._tokens[self._random.integers(len(self._tokens), size=len(inputs.logit_rows))]
        return PendingStep(plan, drawn.tolist(), self._end_s)

    def _frame(self, plan: list[Work], inputs: StepInputs) -> Frame:
        rows = len(inputs.logit_rows)
        if not len(plan) == len(inputs.token_ids) == rows:
            works, blocks = inputs.block_tables.shape
            return Frame(Shape(len(inputs.token_ids), works, blocks, rows), self._upload)
        size = next(size for size in SIZES if size >= rows)
        if size not in self._frames:
            self._frames[size] = Frame(Shape(size, size, self._blocks, size), self._upload)
        return self._frames[size]


@dataclass
class Host:
    """An engine on a simulated device, and the service in front of it."""

    engine: Engine
    service: Service

    @classmethod
    def of(cls, folder: Path, concurrency: int, step_s: float) -> "Host":
        config = ModelConfig.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder, config.vocab_size)
        words = [token for token in range(config.vocab_size) if len(tokenizer.token_bytes(token)) > 1]
        limits = Limits(concurrency, CudaOps.prefill_tokens, speculative_rows=8)
        books = BlockCache(concurrency * POSITIONS // 16, 16, concurrency, POSITIONS, window=4096)
        runner = ClockRunner(books, limits, words, step_s)
        engine = Engine(Scheduler(books, limits, runner.device_counts), runner, POSITIONS, config.vocab_size, TIMEOUT_S)
        service = Service(engine, tokenizer, config.bos_token_id, frozenset(config.eos_token_ids))
        return cls(engine, service)

    def generate_tokens(self, caller: int) -> None:
        """Generate an answer without decoding it to text."""
        params = SamplingParams(TOKENS, stop_ids=frozenset(), seed=caller, temperature=0.7, top_p=0.95)
        self.engine.submit(list(range(24 * caller + 5, 24 * caller + 29)), params).wait_until_finished(TIMEOUT_S)

    def generate_text(self, caller: int) -> None:
        for _ in self.service.generate(Request.parse(prompt=f"{caller}: tell me", seed=caller, max_tokens=TOKENS)):
            pass


@dataclass(frozen=True)
class Found:
    tokens_per_s: float
    cores: float  # kept busy by this process


def measure(ask: Callable[[int], None], concurrency: int) -> Found:
    began_s, cpu_s = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(concurrency) as callers:
        list(callers.map(ask, range(concurrency)))
    took_s = time.perf_counter() - began_s
    return Found(concurrency * TOKENS / took_s, (time.process_time() - cpu_s) / took_s)


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=checkpoint, required=True, help="a checkpoint folder")
    options = parser.parse_args()
    print(f"{usable_cores()} cores · torch {torch.__version__}\n")
    print(f"{TOKENS} tokens an answer, medians of {ROUNDS} rounds, as a share of what the device alone could do")
    for concurrency, step_ms in STEPS_MS.items():
        with frozen_heap():  # as in the server
            host = Host.of(options.weights, concurrency, step_ms / 1e3)
        ways = {"engine": host.generate_tokens, "text": host.generate_text}
        found: dict[str, list[Found]] = {way: [] for way in ways}
        for turn in range(ROUNDS + 1):
            for way, ask in ways.items():
                figures = measure(ask, concurrency)
                if turn > 0:  # the first round warms up
                    found[way].append(figures)
        host.engine.close()
        pace = concurrency / step_ms * 1e3
        line = f"  {concurrency:>2} at once, steps of {step_ms} ms: {pace:6.0f} tokens/s"
        for way, figures_of in found.items():
            rate = statistics.median(each.tokens_per_s for each in figures_of)
            cores = statistics.median(each.cores for each in figures_of)
            line += f"   {way} {rate / pace:6.1%}, {cores:.2f} cores"
        print(line, flush=True)


if __name__ == "__main__":
    main()
