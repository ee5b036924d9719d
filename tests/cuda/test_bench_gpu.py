"""The GPU benchmark's way of measuring, on emulated kernels and a tiny model: that it measures, not what."""

import re
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import card, loading, products, sections, serving, trace
from bench.gpu.clock import Clock, captured
from bench.gpu.decode import Decoding, filled_cache, step_bytes
from bench.gpu.products import Contender, Shape
from starling.model.awq import AwqWeight
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral
from starling.model.ops.cuda import CudaOps
from tests.cuda.emulator import emulated_ops
from tests.model.tiny import write_checkpoint

CPU = Clock(torch.device("cpu"))
SMALL = Shape("small", 64, 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(
        folder, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1, sliding_window=40,
        vocab_size=67, max_position_embeddings=256,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Mistral:
    return Mistral.load(folder, emulated_ops())


@pytest.fixture(scope="module")
def cache(model: Mistral) -> KVCache:
    return filled_cache(model, 40)


def test_decoding_is_timed_at_any_context(model: Mistral, cache: KVCache) -> None:
    decoding = Decoding(model, cache, 4)
    for requests, context in ((1, 7), (2, 70)):  # the second has passed the window
        found = decoding.measure(requests, context, steps=2)
        assert min(found.device_s, found.wall_s, found.first_s) > 0
        assert 0 <= found.host_s <= found.wall_s
        assert not decoding.scheduler.running
    assert decoding.scheduler.counters.decode_tokens == 1 * 6 + 2 * 6
    assert decoding.scheduler.cache.available == cache.blocks


def test_the_floor_counts_what_the_window_leaves(model: Mistral) -> None:
    per_token = 2 * model.config.num_hidden_layers * model.config.kv_size * 2
    assert step_bytes(model, 1000, 2, 30) == 1000 + 2 * 30 * per_token
    assert step_bytes(model, 1000, 2, 100) == 1000 + 2 * 40 * per_token


def test_callers_are_timed_through_the_engine(model: Mistral, cache: KVCache) -> None:
    engine = serving.own_engine(model, cache, 4)
    callers = serving.Callers(engine, model.config.vocab_size)
    assert callers.first_token_s(20, rounds=1) > 0
    rate, seconds = callers.throughput(2, 9, 3)
    assert rate == pytest.approx(6 / seconds)
    engine.close()


def test_ceilings_are_measured() -> None:
    found = card.measure(CPU, 1 << 20, 64)
    assert min(found.copy, found.read, found.tensor) > 0 and found.bandwidth >= found.copy


def test_loading_is_measured_in_parts(folder: Path, model: Mistral) -> None:
    assert loading.read_rate(folder / "model.safetensors", 2, pinned=False) > 0
    assert loading.pack_seconds(model.config, model.ops, CPU) > 0


def test_products_are_compared_with_float32_before_they_are_timed() -> None:
    def exact(weight: AwqWeight) -> products.Multiply:
        return lambda x: (x.float() @ weight.dequantize().T).half()

    def shifted(weight: AwqWeight) -> products.Multiply:
        return lambda x: exact(weight)(x).roll(1, 1)

    def broken(weight: AwqWeight) -> products.Multiply:
        raise RuntimeError("no kernel image\nand more")

    contenders = [
        products.ours(emulated_ops()), Contender("exact", exact), Contender("shifted", shifted),
        Contender("broken", broken), Contender("none", None),
    ]  # fmt: skip
    rows = list(products.measured(SMALL, contenders, (1, 3), CPU))
    assert [m for m, _ in rows] == [1, 3]
    for _, (own, its, wrong, raised, absent) in rows:
        assert isinstance(own, float) and isinstance(its, float) and own > 0 and its > 0
        assert str(wrong).startswith("ArithmeticError: wrong by 1.")
        assert raised == "RuntimeError: no kernel image"
        assert absent == "-"
    head = Shape("head", 67, 64, dense=True)
    ((_, (seconds,)),) = products.measured(head, [products.ours(emulated_ops())], (2,), CPU)
    assert isinstance(seconds, float)


def test_a_peer_stands_beside_ours_or_is_named_as_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(products, "SHAPES", (SMALL,))
    monkeypatch.setattr(products, "TOKENS", (1, 2))
    monkeypatch.setitem(sys.modules, "gemlite", None)
    bench = sections.Bench(Path(), emulated_ops())
    sections.peer_products(bench, "gemlite")
    assert capsys.readouterr().out.startswith("gemlite: not installed")
    sections.peer_products(bench, "cublas")
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert all(re.fullmatch(rf"\| {m} \| [\d.]+ \([\d.]+x\) \|", row) for m, row in zip((1, 2), rows, strict=True))


def test_the_floor_of_a_product_is_bytes_then_arithmetic() -> None:
    ceilings = card.Ceilings(copy=1e9, read=2e9, tensor=1e12)
    shape = Shape("s", 4096, 4096)
    assert shape.weight_bytes == 4096 * 4096 / 2 + 4096 * 32 * 2.5
    assert shape.floor_s(1, ceilings) == pytest.approx((shape.weight_bytes + 2 * 8192) / 2e9)
    assert shape.floor_s(10**6, ceilings) == pytest.approx(2e6 * 4096**2 / 1e12)


def test_without_a_gpu_a_graph_is_its_work_in_turn() -> None:
    done: list[int] = []
    captured([lambda: done.append(1), lambda: done.append(2)], CPU.device)()
    assert done == [1, 2]


def test_a_trace_tells_kernels_and_gaps_apart() -> None:
    def event(name: str, begin: float, duration: float, kind: str = "kernel", grid: list[int] | None = None) -> object:
        return {"cat": kind, "name": name, "ts": begin, "dur": duration, "args": {"grid": grid} if grid else {}}

    events = [
        event("left out", 0, 5),
        event("Memcpy HtoD (Pinned -> Device)", 10, 2, "gpu_memcpy"),
        event("narrow", 13, 4, grid=[96, 1, 1]),
        event("narrow", 17, 8, grid=[64, 1, 1]),
        event("void at::native::(anonymous namespace)::index<half>(int, half*)", 24, 3),
        event("cudaGraphLaunch", 11, 1, "cuda_runtime"),
        event("Memcpy HtoD (Pinned -> Device)", 37, 2, "gpu_memcpy"),
        event("narrow", 39, 4, grid=[96, 1, 1]),
    ]
    found = trace.activities(events)  # type: ignore[arg-type]
    assert trace.by_kernel(found, 2)[:2] == [("narrow [96 x 1 x 1]", 1.0, 4.0), ("narrow [64 x 1 x 1]", 0.5, 4.0)]
    assert ("index", 0.5, 1.5) in trace.by_kernel(found, 2)
    assert trace.idle(found) == trace.Idle(within=0.5, between=10.0, steps=2)


def test_a_real_profile_is_read(model: Mistral) -> None:
    x = torch.randn(64, 64)
    found = trace.recorded(lambda: x @ x, CPU)
    assert any("mm" in activity.name for activity in found)


def test_a_section_that_fails_costs_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(bench: sections.Bench) -> None:
        raise ValueError("of no use")

    ops: CudaOps = emulated_ops()
    monkeypatch.setitem(sections.SECTIONS, "machine", ("The machine", failing))
    monkeypatch.setattr(products, "SHAPES", (SMALL,))
    monkeypatch.setattr(products, "TOKENS", (1, 2))
    monkeypatch.setattr(sections, "CONTEXTS", (7,))
    monkeypatch.setattr(sections, "BATCHES", ((1, 7), (2, 7)))
    monkeypatch.setattr(sections, "PROMPTS", (9,))
    monkeypatch.setattr(sections, "CONCURRENCIES", (1,))
    monkeypatch.setattr(sections, "PROMPT_TOKENS", 5)
    monkeypatch.setattr(sections, "ANSWER_TOKENS", 2)
    bench = sections.Bench(folder, ops, blocks=40)
    bench.__dict__["ceilings"] = card.Ceilings(1e9, 1e9, 1e12)
    names = ["machine", "start", "decode", "batches", "first", "concurrency", "memory", "products"]
    sections.run(bench, names)
    printed = capsys.readouterr().out
    assert printed.count("Failed") == 1 and "Failed: ValueError: of no use" in printed
    for name in names:
        assert f"## {sections.SECTIONS[name][0]}" in printed
    assert printed.rstrip().splitlines()[-1].startswith("In all")
