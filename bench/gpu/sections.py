"""What `python -m bench.gpu` prints, one function per section: each measures, and prints rows as it gets them."""

import faulthandler
import gc
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from bench import full_size
from bench.cpu import weight_bytes
from bench.gpu import card, choices, loading, products, serving, trace
from bench.gpu.card import Ceilings
from bench.gpu.clock import Clock
from bench.gpu.decode import PREFILL_TOKENS, ROWS, Decoding, filled_cache, step_bytes
from bench.gpu.models import MODELS
from bench.gpu.peers import PEERS
from starling.engine.graph_runner import SIZES
from starling.model.config import ModelConfig
from starling.model.kv_cache import KVCache
from starling.model.memory import finish_loading
from starling.model.mistral import Mistral
from starling.model.ops import Ops
from starling.model.ops.cuda import CudaOps, linear, nvrtc
from starling.model.ops.cuda.device import architecture
from starling.service import load_engine
from starling.settings import Settings

BLOCK = 16
CONTEXTS = (128, 1024, 4096)
BATCHES = ((1, 128), (2, 128), (4, 128), (8, 128), (16, 128), (32, 128), (64, 128), (32, 1024))
PROMPTS = (32, 128, 512, 2048)
OVERLAPS = ((1, 128), (1, 4096), (8, 128), (32, 1024))  # requests, context
CONCURRENCIES = (1, 8, 32)
PROMPT_TOKENS, ANSWER_TOKENS = 128, 128
PROFILED_STEPS = 8
SHOWN_KERNELS = 14
STDERR = 2  # the process's own, even where sys.stderr is replaced
SECTION_TIMEOUT_S = 240
REST_TIMEOUT_S = 1200
PEER_TIMEOUT_S = 75
MODEL_TIMEOUT_S = 90


@dataclass
class Bench:
    """What the sections share, made when first needed. `quick` leaves out long contexts and repeats.

    `serial`: the same operations by kernels that do not overlap, where those of `ops` do.
    """

    folder: Path
    ops: Ops
    serial: Ops | None = None
    quick: bool = False
    blocks: int = 2400  # of the KV cache: 32 sequences of 1,024 tokens and 64 of 128 must fit

    @property
    def device(self) -> torch.device:
        return self.ops.device

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.device)

    @cached_property
    def ceilings(self) -> Ceilings:
        return card.measure(self.clock)

    @cached_property
    def model(self) -> Mistral:
        return Mistral.load(self.folder, self.ops, cache_folders=())

    @cached_property
    def cache(self) -> KVCache:
        return filled_cache(self.model, self.blocks, BLOCK)

    @cached_property
    def decoding(self) -> Decoding:
        return Decoding(self.model, self.cache, max(requests for requests, _ in BATCHES))

    def floor_s(self, requests: int, context: int) -> float:
        """The floor of a decode step: the bytes that it must read, at the measured bandwidth."""
        return step_bytes(self.model, weight_bytes(self.model), requests, context) / self.ceilings.bandwidth

    def free_model(self) -> None:
        """Free the model's memory."""
        for name in ("decoding", "cache", "model"):
            self.__dict__.pop(name, None)
        gc.collect()  # a runner is part of a reference cycle, and holds them all
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


def head(*columns: str) -> None:
    say("", "| " + " | ".join(columns) + " |", "|" + "--:|" * len(columns))


def row(*cells: object) -> None:
    say("| " + " | ".join(map(str, cells)) + " |")


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def machine(bench: Bench) -> None:
    say(card.description(bench.device) + ".")
    found = bench.ceilings
    say(
        f"Measured: copy {found.copy / 1e9:.0f} GB/s (read + written), read {found.read / 1e9:.0f} GB/s, "
        f"fp16 product of {card.MATRIX}³ {found.tensor / 1e12:.0f} TFLOP/s. Floors use "
        f"{found.bandwidth / 1e9:.0f} GB/s."
    )


def start(bench: Bench) -> None:
    """Loading the weights: its parts, and the whole."""
    checkpoint = bench.folder / "model.safetensors"
    size = checkpoint.stat().st_size
    pinned = bench.device.type == "cuda"
    rates = {threads: loading.read_rate(checkpoint, threads, pinned) for threads in (1, 2, 4, 8)}
    say(f"Checkpoint: {size / 1e9:.2f} GB in the page cache. Read into {'pinned' if pinned else 'plain'} buffers: ")
    say(", ".join(f"{threads} threads {rate / 1e9:.1f} GB/s" for threads, rate in rates.items()) + ".")
    if pinned:
        with tempfile.TemporaryDirectory() as cache:
            began_s = time.perf_counter()
            nvrtc.compile_ahead((architecture(bench.device),), Path(cache))
            say(f"All kernels compiled by NVRTC, in parallel: {time.perf_counter() - began_s:.2f} s.")
    config = bench.model.config  # loads the model, so that whatever is compiled once is compiled
    copy_rate, pack_s = loading.copy_rate(bench.clock), loading.pack_seconds(config, bench.ops, bench.clock)
    bench.free_model()
    if pinned:
        torch.cuda.reset_peak_memory_stats()
    began_s = time.perf_counter()
    assert bench.model is not None
    bench.clock.wait()
    load_s = time.perf_counter() - began_s
    say(
        f"Copies from pinned memory {copy_rate / 1e9:.1f} GB/s. Estimates: reading {size / rates[1]:.2f} s, "
        f"copying {size / copy_rate:.2f} s, packing {pack_s:.2f} s. Loading as a whole, measured: {load_s:.2f} s."
    )
    if pinned:
        peak = torch.cuda.max_memory_reserved()
        finish_loading(bench.device)
        say(f"Memory while loading: at most {peak / 1e9:.2f} GB, then {torch.cuda.memory_reserved() / 1e9:.2f} GB.")


def decode(bench: Bench) -> None:
    """Batch 1 by context."""
    head("context", "floor ms", "device ms", "of the floor", "step ms", "tok/s", "of the floor", "host ms", "first ms")
    for context in CONTEXTS:
        if not bench.quick or context <= 1024:
            found, device_s = bench.decoding.measure(1, context), bench.decoding.device_s(1)
            floor_s = bench.floor_s(1, context)
            row(
                context, ms(floor_s), ms(device_s), f"{floor_s / device_s:.0%}", ms(found.wall_s),
                f"**{1 / found.wall_s:.0f}**", f"{floor_s / found.wall_s:.0%}", ms(found.host_s), ms(found.first_s),
            )  # fmt: skip
    say(
        "", "Device: a captured step, replayed. Step: from result to result with the host one step behind; host: the "
        "part in which it does not wait. First: a size's first step, which is computed and then captured.",
    )  # fmt: skip
    drafting, device_s = bench.decoding.measure(1, CONTEXTS[0], drafting=True), bench.decoding.device_s(ROWS)
    say(
        f"With {ROWS - 1} drafts at {CONTEXTS[0]}: device {ms(device_s)} ms, step {ms(drafting.wall_s)}, "
        f"host {ms(drafting.host_s)}; such a step waits for the one before."
    )


def overlap(bench: Bench) -> None:
    """The gain from kernels that begin before the previous one has ended: a replayed step of either kind, in turn."""
    if bench.serial is None:
        say("On this GPU, with this driver, kernels do not overlap: each begins when the one before has ended.")
        return
    serial = Decoding(replace(bench.model, ops=bench.serial), bench.cache, bench.decoding.max_running)
    head("batch", "context", "floor ms", "overlapping ms", "serial ms", "gain")
    for requests, context in OVERLAPS[: 1 if bench.quick else None]:
        for decoding in (bench.decoding, serial):
            decoding.measure(requests, context, 8)
        replays = [partial(decoding.runner.replay, requests) for decoding in (bench.decoding, serial)]
        own_s, serial_s = bench.clock.medians(replays)
        floor_s = bench.floor_s(requests, context)
        row(requests, context, ms(floor_s), ms(own_s), ms(serial_s), f"{serial_s / own_s:.2f}x")


def batches(bench: Bench) -> None:
    """Throughput by batch size, over a KV cache that counts as computed."""
    head(
        "batch",
        "context",
        "floor ms",
        "device ms",
        "step ms",
        "tok/s",
        "against 1",
        "of the floor",
        "host ms",
        "first ms",
    )
    single: float | None = None
    for requests, context in BATCHES:
        if bench.quick and requests not in (1, 8, 32):
            continue
        found, device_s = bench.decoding.measure(requests, context, 32), bench.decoding.device_s(requests)
        floor_s = bench.floor_s(requests, context)
        rate = requests / found.wall_s
        single = single or rate
        row(
            requests, context, ms(floor_s), ms(device_s), ms(found.wall_s), f"**{rate:.0f}**",
            f"{rate / single:.1f}x", f"{floor_s / found.wall_s:.0%}", ms(found.host_s), ms(found.first_s),
        )  # fmt: skip


def first_token(bench: Bench) -> None:
    """Through the engine: from submission to the first delivery."""
    engine = serving.own_engine(bench.model, bench.cache, 1)
    try:
        callers = serving.Callers(engine, bench.model.config.vocab_size)
        head("prompt", "first token ms", "tok/s of prompt")
        for tokens in PROMPTS:
            seconds = callers.first_token_s(tokens, 3 if bench.quick else 5)
            row(tokens, f"**{ms(seconds)}**", f"{tokens / seconds:.0f}")
    finally:
        engine.close()


def concurrency(bench: Bench) -> None:
    """Whole answers through the engine."""
    engine = serving.own_engine(bench.model, bench.cache, max(CONCURRENCIES))
    try:
        callers = serving.Callers(engine, bench.model.config.vocab_size)
        say(f"Prompts of {PROMPT_TOKENS} tokens, answers of {ANSWER_TOKENS}, sampled at 0.7 and top-p 0.95.")
        head("concurrency", "tok/s", "against 1", "s in all")
        single: float | None = None
        for requests in CONCURRENCIES:
            callers.throughput(requests, PROMPT_TOKENS, 8)  # captures the graphs it needs
            rate, seconds = callers.throughput(requests, PROMPT_TOKENS, ANSWER_TOKENS)
            single = single or rate
            row(requests, f"**{rate:.0f}**", f"{rate / single:.1f}x", f"{seconds:.2f}")
    finally:
        engine.close()


def kernels(bench: Bench) -> None:
    """Device time by kernel, of a decode step and of a prefill chunk."""
    decoding = bench.decoding
    for requests, context in ((1, 1024), (32, 1024)):
        if bench.quick and requests > 1:
            continue
        decoding.add(requests, context - PROFILED_STEPS - 5)
        for _ in range(4):
            decoding.step()
        bench.clock.wait()
        found = trace.recorded(lambda: _repeat(decoding.step, PROFILED_STEPS), bench.clock)
        decoding.clear()
        _kernels(f"decode of {requests} at {context}", found, PROFILED_STEPS)

    def prompt() -> None:
        decoding.add_prompt(PREFILL_TOKENS)
        decoding.step()
        decoding.clear()

    prompt()
    found = trace.recorded(lambda: _repeat(prompt, 3), bench.clock)
    _kernels(f"prompt of {PREFILL_TOKENS}", found, 3)


def _repeat(work: Callable[[], object], times: int) -> None:
    for _ in range(times):
        work()


def _kernels(title: str, found: list[trace.Activity], steps: int) -> None:
    rows = trace.by_kernel(found, steps)
    total = sum(each[2] for each in rows)
    say("", f"| {title} | launches | µs | share |", "|:--|--:|--:|--:|")
    for name, launches, spent in rows[:SHOWN_KERNELS]:
        row(name, f"{launches:.0f}", f"{spent:.1f}", f"{spent / total:.1%}")
    if len(rows) > SHOWN_KERNELS:
        rest = sum(each[2] for each in rows[SHOWN_KERNELS:])
        row(f"{len(rows) - SHOWN_KERNELS} others", "", f"{rest:.1f}", f"{rest / total:.1%}")
    row("all", f"{sum(each[1] for each in rows):.0f}", f"{total:.1f}", "")
    idle = trace.idle(found)
    say("", f"Idle within a step {idle.within:.1f} µs, between steps {idle.between:.1f} µs, with the profiler running.")


def memory(bench: Bench) -> None:
    model, cache = bench.model, bench.cache
    embedding = model.embedding.nbytes + model.rotary.nbytes
    say(
        f"Weights {weight_bytes(model) / 1e9:.3f} GB, embedding and rotary table {embedding / 1e9:.3f} GB, KV cache "
        f"{(cache.keys.nbytes + cache.values.nbytes) / 1e9:.2f} GB ({cache.blocks} blocks of {cache.block_size})."
    )
    if bench.device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(bench.device)[0]
    runner = Decoding(model, cache, 64)
    made = free - torch.cuda.mem_get_info(bench.device)[0]
    for size in (size for size in SIZES if size <= 64):
        runner.measure(size, 64, 8)
    captured = free - torch.cuda.mem_get_info(bench.device)[0]
    free, total = torch.cuda.mem_get_info(bench.device)
    say(
        f"A runner of 64: {made / 1e6:.0f} MB; with graphs for 1 to 64: {captured / 1e6:.0f} MB. Peak of tensors "
        f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB, held by the allocator "
        f"{torch.cuda.memory_reserved() / 1e9:.2f} GB, in use on the card {(total - free) / 1e9:.2f} GB of "
        f"{total / 1e9:.1f}."
    )


def plan(bench: Bench) -> None:
    """What the steps of a server with the most slots take of the memory that is kept for them."""
    if bench.device.type != "cuda":
        return
    engine = load_engine(bench.folder, Settings(device="cuda", max_concurrency=SIZES[-1]))
    try:
        free, total = torch.cuda.mem_get_info(bench.device)
        callers = serving.Callers(engine, ModelConfig.from_folder(bench.folder).vocab_size)
        for requests in SIZES:
            callers.throughput(requests, PROMPT_TOKENS, 8)  # captures the graph of this size
        callers.throughput(1, max(PROMPTS), 8)
        taken = free - torch.cuda.mem_get_info(bench.device)[0]
        say(
            f"{SIZES[-1]} slots: {engine.occupancy['kv_blocks']} blocks of KV cache. Once loaded, {free / 1e9:.2f} GB "
            f"of {total / 1e9:.1f} are free; steps and graphs of every size take {taken / 1e9:.2f} of them."
        )
    finally:
        engine.close()
    del engine, callers
    bench.free_model()  # the engine's, for the sections that follow


def own_products(bench: Bench) -> None:
    """Our products with the model's matrices: µs, and share of the floor."""
    say("µs (share of the floor) of x [M, K] times a weight [N, K], weights cold; floor: bytes or arithmetic.")
    if bench.serial is not None:
        say("Each product begins while the one before it ends, as in a step.")
    head("M", *(f"{shape.name} {shape.rows}x{shape.columns}" for shape in products.SHAPES))
    ceilings = bench.ceilings
    found: dict[int, list[str]] = {m: [] for m in products.TOKENS}
    for shape in products.SHAPES:
        for m, (seconds,) in products.measured(shape, [products.ours(bench.ops)], products.TOKENS, bench.clock):
            share = "" if isinstance(seconds, str) else f" ({shape.floor_s(m, ceilings) / seconds:.0%})"
            found[m].append(seconds if isinstance(seconds, str) else us(seconds) + share)
    for m, cells in found.items():
        row(m, *cells)
    step = [shape.floor_s(1, ceilings) * (1 if shape.dense else 32) for shape in products.SHAPES]
    say("", f"Floors at M = 1, 32 layers and the head: {math.fsum(step) * 1e3:.2f} ms.")


def kernel_choices(bench: Bench) -> None:
    """Every kernel that could run for each number of tokens, and what linear.py should choose accordingly."""
    assert isinstance(bench.ops, CudaOps)
    kernels = choices.Kernels(bench.ops._load, bench.device)
    say(
        "µs, weights cold, including the norm before a matrix where there is one; * marks what is chosen now, bold the "
        f"fastest. `/ {linear.SPLITS}`: each block takes a range of K. Results are equal to the bit, or else `differs`."
    )
    found: list[choices.Figures] = []
    for site in choices.SITES:
        of_site = list(
            choices.measured(kernels, bench.ops, site, choices.TOKENS[:: 3 if bench.quick else 1], bench.clock)
        )
        variants = list(dict.fromkeys(variant for figures in of_site for variant in figures.seconds))
        variants.sort(key=lambda variant: variant not in (choices.FUSED, choices.NARROW))
        head(f"{site.shape.name}: M", *map(str, variants))
        for figures in of_site:
            row(figures.tokens, *(_choice(figures, variant) for variant in variants))
        found += of_site
    advice = choices.advice(found)
    say(
        "",
        f"- NORM_TOKENS is {linear.NORM_TOKENS}; by these figures {advice.norm_tokens}.",
        f"- NARROW_TOKENS is {linear.NARROW_TOKENS}; by these figures {advice.narrow_tokens}.",
        f"- K is split where a grid has fewer than {bench.ops._linear._processors} blocks, as many as there are "
        f"multiprocessors; by these figures fewer than {advice.split_below}.",
    )
    head("M", "a step's products now, µs", "with the fastest, µs", "saving")
    for tokens, (now_s, best_s) in advice.steps.items():
        row(tokens, us(now_s), us(best_s), f"{1 - best_s / now_s:.0%}")


def _choice(figures: choices.Figures, variant: choices.Variant) -> str:
    seconds = figures.seconds.get(variant, "")
    if isinstance(seconds, str):
        return seconds
    text = us(seconds) + ("*" if variant == figures.chosen else "")
    return f"**{text}**" if figures.site.times * seconds == figures.best() else text


def peer_products(bench: Bench, name: str) -> None:
    """Another library's products beside ours."""
    try:
        peer = PEERS[name]()
    except ImportError as error:
        say(f"{name}: not installed ({error}).")
        return
    say(f"{peer.name}: µs, and how many times as long as ours in the same run.")
    shapes = [shape for shape in products.SHAPES if not shape.dense or peer.make_dense is not None]
    head("M", *(f"{shape.name} {shape.rows}x{shape.columns}" for shape in shapes))
    contenders = [products.ours(bench.ops), peer]
    tokens = products.TOKENS[:: 2 if bench.quick else 1]
    found = [products.measured(shape, contenders, tokens, bench.clock) for shape in shapes]
    for m in tokens:  # row by row, so that if time runs out, every matrix has been measured at few tokens
        cells = []
        for _, (own, its) in map(next, found):
            if isinstance(own, str) or isinstance(its, str):
                cells.append(str(its if isinstance(its, str) else own))
            else:
                cells.append(f"{us(its)} ({its / own:.2f}x)")
        row(m, *cells)


def peers(bench: Bench) -> None:
    """Each library in its own process, with a time limit: some compile for minutes, and a crash ends only one."""
    for name in PEERS:
        say("")
        _run_child(["--peer", name, *(["--quick"] if bench.quick else [])], PEER_TIMEOUT_S, name)


def models(bench: Bench) -> None:
    """Other engines on the whole model: batch 1."""
    for name in MODELS:
        _run_child(["--model", name, "--folder", str(bench.folder)], MODEL_TIMEOUT_S, name)


def _run_child(arguments: list[str], timeout_s: float, name: str) -> None:
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    try:
        code = subprocess.run(command, timeout=timeout_s, check=False).returncode
    except subprocess.TimeoutExpired:
        say(f"{name}: stopped after {timeout_s} s.")
    else:
        if code:
            say(f"{name}: its process ended with status {code}.")


SECTIONS: dict[str, tuple[str, Callable[[Bench], None]]] = {
    "machine": ("The machine", machine),
    "start": ("Loading the weights", start),
    "decode": ("Decoding one stream", decode),
    "overlap": ("Kernels that overlap", overlap),
    "batches": ("Decoding in batches", batches),
    "first": ("First token, through the engine", first_token),
    "concurrency": ("Throughput, through the engine", concurrency),
    "memory": ("Memory", memory),
    "kernels": ("Time by kernel", kernels),
    "plan": ("Memory, as a server plans it", plan),
    "products": ("Matrix products", own_products),
    "choices": ("Matrix products, by kernel", kernel_choices),
    "peers": ("Matrix products, beside other libraries", peers),
    "models": ("Whole models, by other engines", models),
}
ISOLATED = ("peers", "models")  # run in processes of their own, each with a time limit
WITHOUT_MODEL = ("plan", "products", "choices", *ISOLATED)  # do not use the model, and need its memory


def run(bench: Bench, names: list[str]) -> None:
    """Run each section on its own: if one fails it says so, and the next begins, in a new process if this one has lost
    the device. A section that hangs ends the process with a traceback.
    """
    began_s = time.perf_counter()
    for index, name in enumerate(names):
        title, section = SECTIONS[name]
        if name in WITHOUT_MODEL:
            bench.free_model()
        say("", f"## {title}", "")
        section_began_s = time.perf_counter()
        if name not in ISOLATED:
            faulthandler.dump_traceback_later(SECTION_TIMEOUT_S, exit=True, file=STDERR)
        try:
            with torch.inference_mode():
                section(bench)
        except Exception as error:  # noqa: BLE001 - one section's failure must not cost the others
            say("", f"Failed: {type(error).__name__}: {error}")
        finally:
            faulthandler.cancel_dump_traceback_later()
        say("", f"({time.perf_counter() - section_began_s:.0f} s)")
        if index + 1 < len(names) and _is_lost(bench):
            say("", "This process has lost the device; a new one does the rest.")
            only = [word for rest in names[index + 1 :] for word in ("--only", rest)]
            quick = ["--quick"] if bench.quick else []
            _run_child([*only, *quick, "--folder", str(bench.folder)], REST_TIMEOUT_S, "the rest")
            break
    say("", f"In all: {time.perf_counter() - began_s:.0f} s.")


def _is_lost(bench: Bench) -> bool:
    try:
        bench.clock.wait()
    except RuntimeError:
        return True
    return False


def make_checkpoint(folder: Path) -> None:
    began_s = time.perf_counter()
    full_size.make(folder)
    say(f"Random weights of the full size, made or found in {time.perf_counter() - began_s:.0f} s.")
