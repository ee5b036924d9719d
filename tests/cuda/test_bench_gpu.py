"""The GPU benchmark on emulated kernels and a tiny model: that it measures, not what it measures."""

import re
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch

from bench.gpu import card, choices, loading, products, sections, serving, trace
from bench.gpu.choices import FUSED, NARROW, Figures, Site, Variant
from bench.gpu.clock import Clock, captured
from bench.gpu.decode import ROWS, Decoding, filled_cache, step_bytes
from bench.gpu.products import Contender, Shape
from starling.model.awq import AwqWeight
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral
from starling.model.ops.cuda import CudaOps
from tests.cuda.emulator import emulated_ops
from tests.model.tiny import write_checkpoint

CPU = Clock(torch.device("cpu"))
MEDIANS = Clock.medians
SMALL = Shape("small", 64, 256)


@pytest.fixture(autouse=True)
def single_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on the figures, and emulated kernels take a thousand times as long as a GPU's."""
    monkeypatch.setattr(Clock, "medians", lambda clock, works, rounds=5: MEDIANS(clock, works, rounds=1))


def test_works_take_turns() -> None:
    done: list[str] = []
    found = MEDIANS(CPU, [lambda: done.append("a"), lambda: done.append("b")], rounds=3)
    assert [name for name, _ in groupby(done)] == ["a", "b"] * (1 + 3)  # a call to set the repeats, three rounds
    assert len(found) == 2 and min(found) > 0


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
    for requests, context in ((1, 7), (2, 70)):  # the second reaches beyond the window
        found = decoding.measure(requests, context, steps=2)
        assert min(found.wall_s, found.first_s, decoding.device_s(requests)) > 0
        assert 0 <= found.host_s <= found.wall_s
        assert not decoding.scheduler.running
    assert decoding.scheduler.counters.decode_tokens == 1 * 6 + 2 * 6
    found = decoding.measure(1, 20, steps=2, drafting=True)
    assert decoding.scheduler.counters.proposed >= 6 and decoding.device_s(ROWS) > 0 and found.wall_s > 0
    assert decoding.scheduler.cache.available == cache.blocks


def test_the_floor_counts_only_tokens_within_the_window(model: Mistral) -> None:
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


SITES = (
    Site(Shape("normed", 128, 256), choices.STORE, True, 32),
    Site(Shape("added", 64, 256), choices.ADD, False, 32),
    Site(Shape("paired", 128, 256), choices.SILU_MUL, True, 32),
    Site(Shape("head", 67, 64, dense=True), choices.LOGITS, False, 1),
)


@pytest.mark.parametrize("site", SITES, ids=lambda site: str(site.shape.name))
def test_every_kernel_that_could_take_the_tokens_is_timed(site: Site) -> None:
    ops: CudaOps = emulated_ops()
    kernels = choices.Kernels(ops._load, ops.device)
    few, many = choices.measured(kernels, ops, site, (1, 16), CPU)
    wide = {
        name
        for name in ("wide_8", "wide_16", "wide_32", "wide_64", "wide_64_tall")
        if not site.shape.dense or "t" not in name
    }
    assert {variant.kernel for variant in few.seconds} == wide | {"narrow"} | (
        {"narrow_norm"} if site.normed else set()
    )
    assert few.chosen == (FUSED if site.normed else NARROW)
    assert {variant.kernel for variant in many.seconds} == wide - {"wide_8"}
    assert many.chosen == Variant("wide_16", True)  # with fewer blocks than there are multiprocessors
    for figures in (few, many):
        assert all(isinstance(each, float) and each > 0 for each in figures.seconds.values()), figures.seconds
        assert figures.best() <= figures.best(figures.chosen) < float("inf")


def test_a_kernel_whose_result_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(choices.Kernels):
        def run(self, variant: Variant, inputs: choices.Inputs, weight: object, out: torch.Tensor) -> None:
            super().run(variant, inputs, weight, out)  # type: ignore[arg-type]
            out[0, 0] += variant.kernel == "wide_8"
            assert variant != Variant("wide_16", True), "not so"

    ops: CudaOps = emulated_ops()
    (found,) = choices.measured(Wrong(ops._load, ops.device), ops, SITES[1], (1,), CPU)
    assert found.seconds.pop(Variant("wide_8", False)) == found.seconds.pop(Variant("wide_8", True)) == "differs"
    assert found.seconds.pop(Variant("wide_16", True)) == "AssertionError: not so"
    assert all(isinstance(each, float) for each in found.seconds.values())


def test_choices_are_advised_by_the_whole_step() -> None:
    whole, split = Variant("wide_8", False), Variant("wide_8", True)

    def figures(site: int, tokens: int, blocks: int, *seconds: float | str) -> Figures:
        variants = ([FUSED] if SITES[site].normed else []) + [NARROW, whole, split]
        times = dict(zip(variants, seconds, strict=True))
        return Figures(SITES[site], tokens, NARROW, times, {whole: blocks, split: blocks})

    found = [
        figures(0, 1, 100, 1.0, 1.5, 2.0, 3.0),
        figures(1, 1, 10, 4.0, 9.0, 5.0),
        figures(0, 2, 100, 2.0, 1.9, 2.5, 3.0),  # the fused norm takes longer
        figures(1, 2, 10, 6.0, 9.0, 5.5),  # narrow takes longer here, but not in both together
        figures(0, 4, 100, 1.0, 3.0, 2.5, 3.0),
        figures(1, 4, 10, 6.0, 9.0, "differs"),
        figures(0, 8, 100, 1.0, 3.0, 2.5, 3.0),
        figures(1, 8, 10, 6.0, 5.0, 5.5),  # the one wide grid that a split does not make faster
    ]
    advice = choices.advice(found)
    assert (advice.norm_tokens, advice.narrow_tokens, advice.split_below) == (1, 4, 11)
    assert advice.steps[2] == (32 * (1.9 + 6.0), 32 * (1.9 + 5.5))


def test_a_peer_is_measured_beside_ours_or_reported_missing(
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


def test_a_failing_section_does_not_stop_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(bench: sections.Bench) -> None:
        raise ValueError("of no use")

    ops: CudaOps = emulated_ops()
    monkeypatch.setitem(sections.SECTIONS, "machine", ("The machine", failing))
    monkeypatch.setattr(products, "SHAPES", (SMALL,))
    monkeypatch.setattr(products, "TOKENS", (1, 2))
    monkeypatch.setattr(choices, "SITES", SITES[:1])
    monkeypatch.setattr(choices, "TOKENS", (1, 2))
    monkeypatch.setattr(sections, "CONTEXTS", (7,))
    monkeypatch.setattr(sections, "BATCHES", ((1, 7), (2, 7)))
    monkeypatch.setattr(sections, "PROMPTS", (9,))
    monkeypatch.setattr(sections, "CONCURRENCIES", (1,))
    monkeypatch.setattr(sections, "PROMPT_TOKENS", 5)
    monkeypatch.setattr(sections, "ANSWER_TOKENS", 2)
    monkeypatch.setattr(sections, "OVERLAPS", ((2, 7),))
    bench = sections.Bench(folder, ops, emulated_ops(), blocks=40)
    bench.__dict__["ceilings"] = card.Ceilings(1e9, 1e9, 1e12)
    names = [name for name in sections.SECTIONS if name not in ("kernels", *sections.ISOLATED)]
    sections.run(bench, names)
    printed = capsys.readouterr().out
    assert printed.count("Failed") == 1 and "Failed: ValueError: of no use" in printed
    for name in names:
        assert f"## {sections.SECTIONS[name][0]}" in printed
    assert printed.rstrip().splitlines()[-1].startswith("In all")
    assert re.search(r"\| normed: M \| narrow_norm \| narrow \|.*\n.*\n\| 1 \| \*{0,2}[\d.]+\*", printed)
    assert "NORM_TOKENS is 2; by these figures" in printed


class LostClock(Clock):
    """The clock of a device that no longer responds."""

    def wait(self) -> None:
        raise RuntimeError("an illegal memory access was encountered")


def test_a_new_process_does_the_rest_once_the_device_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def losing(bench: sections.Bench) -> None:
        bench.__dict__["clock"] = LostClock(bench.device)
        bench.clock.wait()

    asked: list[list[str]] = []
    monkeypatch.setitem(sections.SECTIONS, "decode", ("Decoding one stream", losing))
    monkeypatch.setattr(sections, "_run_child", lambda arguments, *_: asked.append(arguments))
    bench = sections.Bench(Path("weights"), emulated_ops())
    sections.run(bench, ["decode", "batches", "memory"])
    assert asked == [["--only", "batches", "--only", "memory", "--folder", "weights"]]
    assert "Failed: RuntimeError: an illegal memory access" in capsys.readouterr().out
