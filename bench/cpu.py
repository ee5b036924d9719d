"""The full-size model on this machine's CPU, against its memory bandwidth and against other engines.

    python -m bench.cpu --peers-python /path/to/venv/bin/python > bench/results/cpu-$(date +%F).md

Decoding reads every weight once per step, so the floor of a step's time is those bytes over the memory bandwidth. On a
shared machine that drifts with the neighbours' load, so it is measured before each round, and the share of the floor
refers to that measurement. Peers take turns with our engine, round by round, each in a process of its own, under a
Python that has them installed:
`pip install llama-cpp-python==0.3.36 onnxruntime-genai==0.18.0 onnxruntime onnx onnx-ir transformers torch`.
"""

import argparse
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import full_size, full_size_gguf
from bench.busy_engine import PROMPT, BusyEngine
from bench.command import count, program, report_errors
from bench.peer import Peer
from starling.model.batch import Batch
from starling.model.huge_pages import wait_for_moves
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral
from starling.model.ops.cpu import CpuOps
from starling.model.ops.cpu.ops import MAX_PREFILL_TOKENS

BLOCK = 16
DECODES = ((1, 128), (1, 1024), (1, 2048), (1, 4096), (2, 128), (4, 128), (8, 128), (8, 1024))
PROMPTS = (32, 128, 512, 2048)
PEER_PROMPT = 512  # the longest that peers are given: longer ones take them minutes
PEER_TOKENS = 4096  # and the most tokens in a batch, which they have to prefill before they decode
PEER_TOKENS_AGAIN = 1024  # up to this many, in every round; beyond, in the first only
BUILDER_TIMEOUT_S = 1800
ROUNDS = 3


class MemoryStream:
    """The memory bandwidth at this moment, in bytes per s: the best of a few sums over 1 GiB, on all threads.

    The memory is in huge pages, as the weights are.
    """

    def __init__(self) -> None:
        memory = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        self._block = torch.frombuffer(memory, dtype=torch.float32).fill_(1)
        self._block.sum()

    def measure(self) -> float:
        found = self._block.nbytes / min(_timed(self._block.sum) for _ in range(4))
        time.sleep(0.05)  # torch's threads spin for a while after their work, on cores that the next measurement needs
        return found


class TimedOps:
    """`ops`, called one by one, with the seconds spent in each."""

    def __init__(self, ops: CpuOps) -> None:
        self._ops = ops
        self.seconds: dict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Any:
        if name == "run_layers":  # all layers in one call; without it the model calls each operation
            raise AttributeError(name)
        found = getattr(self._ops, name)
        if not callable(found):
            return found

        def timed(*args: Any) -> Any:
            began_s = time.perf_counter()
            result = found(*args)
            self.seconds[name] += time.perf_counter() - began_s
            return result

        return timed


def _timed(work: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def batch_of(
    requests: int, start: int, tokens: int, prompt: bool, ids: torch.Tensor | None = None, all_logits: bool = False
) -> Batch:
    """`tokens` tokens per request from position `start`, random unless `ids`. A request's blocks are consecutive."""
    blocks = -(-(start + tokens) // BLOCK)
    positions = torch.arange(start, start + tokens, dtype=torch.int32).repeat(requests)
    owner = torch.arange(requests, dtype=torch.int32).repeat_interleave(tokens)
    return Batch(
        token_ids=torch.randint(3, 32000, (requests * tokens,)) if ids is None else ids,
        positions=positions,
        slots=owner * blocks * BLOCK + positions,
        query_starts=torch.arange(requests + 1, dtype=torch.int32) * tokens,
        context_lens=torch.full((requests,), start + tokens, dtype=torch.int32),
        block_tables=torch.arange(requests * blocks, dtype=torch.int32).view(requests, blocks),
        prompt_tokens=torch.full((requests * tokens,), prompt),
        logit_rows=torch.arange(requests * tokens) if all_logits else torch.arange(1, requests + 1) * tokens - 1,
    )


def weight_bytes(model: Mistral) -> int:
    """The least that a step reads: all weights but the embedding."""
    packed = [w for layer in model.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    return sum(tensor.nbytes for weight in (*packed, model.head) for tensor in weight.values())


def decode(model: Mistral, stream: MemoryStream, peers: list[Peer], requests: int, context: int, steps: int) -> str:
    cache = filled_cache(model, requests, context)
    config = model.config
    seen = min(context, config.sliding_window or context)
    kv_bytes = requests * seen * KVCache.bytes_per_block(config, 1, model.ops.kv_dtype)
    batch = batch_of(requests, context - 1, 1, prompt=False)
    model.forward(batch, cache)
    rates, seconds = [], []
    peer_seconds: list[list[float]] = [[] for _ in peers]
    for turn in range(ROUNDS):
        rates.append(stream.measure())
        seconds += [_timed(lambda: model.forward(batch, cache)) for _ in range(steps)]
        if requests * context <= (PEER_TOKENS_AGAIN if turn else PEER_TOKENS):
            for peer, found in zip(peers, peer_seconds, strict=True):
                found.append(peer.ask("decode", requests, context))
    step_s, rate = statistics.median(seconds), statistics.median(rates)
    floor_s = (weight_bytes(model) + kv_bytes) / rate
    return (
        f"| {requests} | {context} | {rate / 1e9:.1f} | {floor_s * 1e3:.0f} | {step_s * 1e3:.0f} "
        f"| {min(seconds) * 1e3:.0f} | **{requests / step_s:.2f}** | {floor_s / step_s:.0%} |"
        + "".join(f" {requests / statistics.median(found):.2f} |" if found else " |" for found in peer_seconds)
    )


def prefill(model: Mistral, stream: MemoryStream, peers: list[Peer], tokens: int) -> str:
    cache = model.allocate_cache(-(-tokens // BLOCK), BLOCK)

    def run() -> None:
        chunk = model.ops.prefill_tokens
        for start in range(0, tokens, chunk):
            model.forward(batch_of(1, start, min(chunk, tokens - start), prompt=True), cache)

    rate, seconds, peer_rates = stream.measure(), [_timed(run)], []
    for peer in peers:
        peer_rates.append(f"{tokens / peer.ask('prefill', tokens):.1f}" if tokens <= PEER_PROMPT else "")
        seconds += [_timed(run)] if tokens <= PEER_PROMPT else []
    own_s = statistics.median(seconds)
    return f"| {tokens} | {rate / 1e9:.1f} | {own_s:.2f} | **{tokens / own_s:.1f}** |" + "".join(
        f" {peer_rate} |" for peer_rate in peer_rates
    )


def prefill_interference(model: Mistral, streams: int) -> list[str]:
    """How a prompt delays the answers that are decoded beside it, by how many of its tokens a step takes."""
    chunks = dict.fromkeys((MAX_PREFILL_TOKENS, model.ops.prefill_tokens))
    found: dict[int, list[tuple[float, list[float]]]] = {chunk: [] for chunk in chunks}
    for _ in range(ROUNDS):
        for chunk in chunks:
            engine = BusyEngine(model, chunk, streams)
            found[chunk].append(engine.prefill_prompt())
            engine.close()
    rows = []
    for chunk, rounds in found.items():
        first_s = statistics.median(first_s for first_s, _ in rounds)
        longest_s = statistics.median(max(gaps) for _, gaps in rounds)
        tokens = statistics.median(len(gaps) for _, gaps in rounds)
        rows.append(f"| {streams} | {chunk} | {longest_s:.2f} | {tokens} | {first_s:.1f} |")
    return rows


def per_op(model: Mistral, context: int, tokens: int, prompt: bool) -> list[str]:
    timed = TimedOps(model.ops)  # type: ignore[arg-type]
    by_op = Mistral(**{**model.__dict__, "ops": timed})
    cache, batch = filled_cache(model, 1, context), batch_of(1, context - tokens, tokens, prompt)
    by_op.forward(batch, cache)
    timed.seconds.clear()
    rounds = 3 if tokens == 1 else 1
    for _ in range(rounds):
        by_op.forward(batch, cache)
    total = sum(timed.seconds.values())
    ranked = sorted(timed.seconds.items(), key=lambda item: -item[1])
    return [f"| {name} | {seconds / rounds * 1e3:.1f} | {seconds / total:.1%} |" for name, seconds in ranked]


def filled_cache(model: Mistral, requests: int, context: int) -> KVCache:
    cache = model.allocate_cache(requests * -(-context // BLOCK), BLOCK)
    for storage in (cache.keys, cache.values):
        storage.copy_(torch.randn(storage.shape[1:]).expand(storage.shape))
    return cache


def open_peers(python: Path, checkpoint: Path, threads: int, skip_onnx: bool) -> list[Peer]:
    longest = max(context for _, context in DECODES)
    gguf = full_size_gguf.make(checkpoint.parent / f"{checkpoint.name}.gguf")
    found = [Peer("llama-cpp", python, gguf, threads, longest)]
    if not skip_onnx:
        folder = onnx_model(python, checkpoint, checkpoint.parent / f"{checkpoint.name}-onnx")
        found.append(Peer("onnxruntime-genai", python, folder, threads, longest))
    return found


def onnx_model(python: Path, checkpoint: Path, folder: Path) -> Path:
    """The AWQ files as onnxruntime-genai's own builder converts them. Made once: minutes, and 8 GB of disk."""
    if not (folder / "genai_config.json").exists():
        builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder)]
        builder += ["-p", "int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4"]
        subprocess.run(builder, stdout=sys.stderr, timeout=BUILDER_TIMEOUT_S, check=True)
    return folder


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


@report_errors
@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, default=full_size.DEFAULT, help="where the weights are, or are made")
    parser.add_argument("--isa", default="auto", help="the kernels' instruction set (default: the best here)")
    parser.add_argument("--threads", type=count, help="default: one per usable core")
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "int8", "int16", "float32"), help="how activations are rounded"
    )
    parser.add_argument("--steps", type=count, default=4, help="decode steps in each of three rounds (default: 4)")
    parser.add_argument("--quick", action="store_true", help="short contexts and prompts only")
    parser.add_argument("--peers-python", type=program, help="a Python with the peers installed; without it, no peers")
    parser.add_argument("--skip-onnx", action="store_true", help="without onnxruntime-genai (minutes to convert)")
    options = parser.parse_args()

    ops = CpuOps(options.threads, options.precision, isa=options.isa)
    torch.set_num_threads(ops.threads)
    folder = full_size.make(options.folder)
    loaded_s = _timed(lambda: Mistral.load(folder, ops))
    wait_for_moves()
    model = Mistral.load(folder, ops)
    wait_for_moves()
    peers = open_peers(options.peers_python, folder, ops.threads, options.skip_onnx) if options.peers_python else []
    names = "".join(f" {peer.name} tok/s |" for peer in peers)
    process = psutil.Process()
    say(
        f"# The full-size model on a CPU, {date.today()}",
        "",
        f"{cpu_name()}, {ops.name}, precision {options.precision}; torch "
        f"{torch.__version__}; load average at the start {os.getloadavg()[0]:.1f}. Random weights, "
        f"{weight_bytes(model) / 1e9:.3f} GB read per step. Loading took {loaded_s:.2f} s.",
        "",
        "| batch | context | stream GB/s | floor ms | step ms | best ms | tok/s | of the floor |" + names,
        "|--:|--:|--:|--:|--:|--:|--:|--:|" + "--:|" * len(peers),
    )
    stream = MemoryStream()
    for requests, context in DECODES:
        if not options.quick or context <= 1024:
            say(decode(model, stream, peers, requests, context, options.steps))
    say("", "| prompt | stream GB/s | s | tok/s |" + names, "|--:|--:|--:|--:|" + "--:|" * len(peers))
    for tokens in PROMPTS:
        if not options.quick or tokens <= 512:
            say(prefill(model, stream, peers, tokens))
    del stream
    for peer in peers:
        now, most = peer.ask("memory")
        say("", f"{peer.version}: {now / 1e9:.2f} GB resident, {most / 1e9:.2f} GB at its peak.")
        peer.close()
    say("", f"| answers beside a prompt of {PROMPT} | of it in a step | longest gap s | tokens each | first token s |")
    say("|--:|--:|--:|--:|--:|", *prefill_interference(model, streams=4))
    for title, context, tokens in (("decode at 1,024", 1024, 1), ("prefill of 256", 256, 256)):
        say("", f"| op, {title} | ms | share |", "|:--|--:|--:|", *per_op(model, context, tokens, tokens > 1))
    filled_cache(model, 1, 1024)
    say("", f"Resident: {process.memory_info().rss / 1e9:.2f} GB with the weights and the last caches.")


if __name__ == "__main__":
    main()
