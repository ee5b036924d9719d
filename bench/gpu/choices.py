"""Which kernel is best for how many tokens: every one that could run, on each of the model's matrices, weights cold."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import torch

from bench.gpu import products
from bench.gpu.clock import Clock, captured
from bench.gpu.products import Shape
from starling.model.ops import Ops
from starling.model.ops.cuda import linear
from starling.model.ops.cuda.linear import ADD, LOGITS, SILU_MUL, STORE, LinearKernels, PackedLinear
from starling.model.ops.cuda.module import Argument, Grid, Module

TOKENS = (1, 2, 4, 8, 16, 32, 64)
EPS = 1e-5
LAYERS = 32
QKV, OUT, GATE_UP, DOWN, HEAD = products.SHAPES


@dataclass(frozen=True)
class Site:
    """A matrix as a decode step uses it."""

    shape: Shape
    epilogue: int
    normed: bool  # an RMSNorm stands before it
    times: int  # that a step does this


SITES = (
    Site(QKV, STORE, True, LAYERS),
    Site(OUT, ADD, False, LAYERS),
    Site(GATE_UP, SILU_MUL, True, LAYERS),
    Site(DOWN, ADD, False, LAYERS),
    Site(HEAD, LOGITS, False, 1),
)


class Variant(NamedTuple):
    """A kernel, and whether K is split into ranges, one for each block."""

    kernel: str
    split: bool

    def __str__(self) -> str:
        return f"{self.kernel} / {linear.SPLITS}" if self.split else self.kernel


FUSED, NARROW = Variant("narrow_norm", False), Variant("narrow", False)


@dataclass(frozen=True)
class Figures:
    """What a site took for `tokens` tokens, including the norm before it."""

    site: Site
    tokens: int
    chosen: Variant  # by LinearKernels itself
    seconds: dict[Variant, float | str]  # text: what failed
    blocks: dict[Variant, int]  # in the grid of each variant that can be split

    def best(self, *among: Variant) -> float:
        """The least seconds per step of the variants in `among`, or of all; infinite where none was timed."""
        found = [each for variant, each in self.seconds.items() if not among or variant in among]
        return self.site.times * min((each for each in found if not isinstance(each, str)), default=float("inf"))


class LaunchRecorder:
    """A module that records which variant it launched last."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self.latest: Variant | None = None

    def launch(self, kernel: str, grid: Grid, threads: int, shared_bytes: int, *arguments: Argument) -> None:
        self.latest = Variant(kernel, grid[2] > 1)
        self._module.launch(kernel, grid, threads, shared_bytes, *arguments)


class Kernels:
    """Runs LinearKernels by its own choice of variant, or by a given one."""

    def __init__(self, load: Callable[[str], Module], device: torch.device) -> None:
        self.device = device
        self._load = load
        self._kernels = LinearKernels(load, device)

    def variants(self, weight: PackedLinear, tokens: int, normed: bool) -> list[Variant]:
        narrow = ([FUSED] if normed else []) + [NARROW] if tokens <= linear.NARROW_MAX_TOKENS else []
        wide = [
            Variant(kernel.name, split) for kernel in weight.wide if kernel.tokens >= tokens for split in (False, True)
        ]
        return narrow + wide

    def blocks(self, variant: Variant, weight: PackedLinear, tokens: int) -> int:
        (kernel,) = (kernel for kernel in weight.wide if kernel.name == variant.kernel)
        return self._kernels._blocks(kernel, tokens, weight)

    def chosen(self, inputs: "Inputs", weight: PackedLinear) -> Variant:
        """The variant that LinearKernels chooses by itself."""
        recorder = LaunchRecorder(self._load(weight.source))
        usual = LinearKernels(lambda source: recorder if source == weight.source else self._load(source), self.device)
        if inputs.site.epilogue == STORE:
            usual.norm_linear(inputs.residual, inputs.norm, EPS, weight)
        elif inputs.site.epilogue == SILU_MUL:
            usual.norm_linear_silu_mul(inputs.residual, inputs.norm, EPS, weight)
        elif inputs.site.epilogue == ADD:
            usual.add_linear(inputs.x, weight, inputs.out(weight))
        else:
            usual.head(inputs.x, weight)
        assert recorder.latest is not None
        return recorder.latest

    def run(self, variant: Variant, inputs: "Inputs", weight: PackedLinear, out: torch.Tensor) -> None:
        epilogue, tokens, kernels = inputs.site.epilogue, len(inputs.x), self._kernels
        if variant == FUSED:
            kernels._narrow(variant.kernel, tokens, weight, epilogue, out, None, (inputs.residual, inputs.norm, EPS))
            return
        x = kernels.rms_norm(inputs.residual, inputs.norm, EPS) if inputs.site.normed else inputs.x
        if variant == NARROW:
            kernels._narrow(variant.kernel, tokens, weight, epilogue, out, x, (None, None, 0.0))
        else:
            (kernel,) = (kernel for kernel in weight.wide if kernel.name == variant.kernel)
            kernels._wide(kernel, linear.SPLITS if variant.split else 1, weight, epilogue, out, x)


class Inputs:
    """A site's inputs for `tokens` tokens."""

    def __init__(self, site: Site, tokens: int, device: torch.device) -> None:
        self.site = site
        self.residual = torch.randn(tokens, site.shape.columns, device=device)
        self.x = self.residual.half()
        self.norm = torch.rand(site.shape.columns, device=device).half()

    def out(self, weight: PackedLinear) -> torch.Tensor:
        width = weight.rows // 2 if self.site.epilogue == SILU_MUL else weight.rows
        dtype = torch.float32 if self.site.epilogue in (ADD, LOGITS) else torch.float16
        return torch.zeros(len(self.x), width, dtype=dtype, device=self.x.device)


def measured(kernels: Kernels, ops: Ops, site: Site, tokens: Sequence[int], clock: Clock) -> Iterator[Figures]:
    """Every variant for each of `tokens`. One whose result differs from the first one's in any bit is not timed."""
    weights = [_packed(ops, site) for _ in range(products.cold_copies(site.shape, clock.device))]
    for count in tokens:
        inputs = Inputs(site, count, clock.device)
        variants = kernels.variants(weights[0], count, site.normed)
        expected: torch.Tensor | None = None
        works: dict[Variant, Callable[[], object] | str] = {}
        for variant in variants:
            out = inputs.out(weights[0])
            fault = products.attempt(partial(kernels.run, variant, inputs, weights[0], out))
            if isinstance(fault, str):
                works[variant] = fault
                continue
            expected = out.clone() if expected is None else expected
            if not torch.equal(out, expected):
                works[variant] = "differs"
                continue
            runs = [partial(kernels.run, variant, inputs, weight, out) for weight in weights]
            works[variant] = products.attempt(partial(captured, runs, clock.device))
        timed = {variant: work for variant, work in works.items() if not isinstance(work, str)}
        seconds: dict[Variant, float | str] = {
            variant: work for variant, work in works.items() if isinstance(work, str)
        }
        for variant, each in zip(timed, clock.medians(list(timed.values()), rounds=3), strict=True):
            seconds[variant] = each / len(weights)
        blocks = {
            variant: kernels.blocks(variant, weights[0], count)
            for variant in variants
            if variant not in (FUSED, NARROW)
        }
        yield Figures(site, count, kernels.chosen(inputs, weights[0]), seconds, blocks)


def _packed(ops: Ops, site: Site) -> PackedLinear:
    weight = products.random_weight(site.shape, ops.device)
    if isinstance(weight, torch.Tensor):
        packed = ops.pack_head(weight)
    else:
        packed = ops.pack_awq(weight, paired=site.epilogue == SILU_MUL)
    assert isinstance(packed, PackedLinear)
    return packed


@dataclass(frozen=True)
class Advice:
    """What the choices in linear.py should be according to the figures, over all products of a step."""

    norm_tokens: int  # up to which a fused norm is as fast as the best variant with a separate one
    narrow_tokens: int  # up to which narrow is as fast as the best wide kernel
    split_below: int  # K is split in grids of fewer blocks: the threshold with the least time in all
    steps: dict[int, tuple[float, float]]  # tokens → seconds of a step's products: as chosen now, and at best


def advice(figures: Sequence[Figures]) -> Advice:
    counts = sorted({each.tokens for each in figures})
    of = {count: [each for each in figures if each.tokens == count] for count in counts}

    def longest(holds: Callable[[int], bool]) -> int:
        return max(takewhile(holds, counts), default=0)

    def fused_pays(count: int) -> bool:
        normed = [each for each in of[count] if each.site.normed]
        others = sum(each.best(*(variant for variant in each.seconds if variant != FUSED)) for each in normed)
        return sum(each.best(FUSED) for each in normed) <= others < float("inf")

    def narrow_pays(count: int) -> bool:
        wide = sum(each.best(*each.blocks) for each in of[count])
        return sum(each.best(NARROW) for each in of[count]) <= wide < float("inf")

    pairs = [
        (each.blocks[variant], each.best(variant), each.best(Variant(variant.kernel, True)))
        for each in figures
        for variant in each.blocks
        if not variant.split
    ]

    def cost(below: int) -> float:
        return sum(split if blocks < below else whole for blocks, whole, split in pairs if whole + split < float("inf"))

    thresholds = [0, *sorted({blocks + 1 for blocks, _, _ in pairs})]
    steps = {
        count: (sum(each.best(each.chosen) for each in of[count]), sum(each.best() for each in of[count]))
        for count in counts
    }
    return Advice(longest(fused_pays), longest(narrow_pays), min(thresholds, key=cost), steps)
