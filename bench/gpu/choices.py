"""Which kernel should take how many tokens: every one that could, at each of the model's matrices, weights cold."""

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
    times: int  # in a step


SITES = (
    Site(QKV, STORE, True, LAYERS),
    Site(OUT, ADD, False, LAYERS),
    Site(GATE_UP, SILU_MUL, True, LAYERS),
    Site(DOWN, ADD, False, LAYERS),
    Site(HEAD, LOGITS, False, 1),
)


class Way(NamedTuple):
    """A kernel, and whether its blocks take a range of K each."""

    kernel: str
    split: bool

    def __str__(self) -> str:
        return f"{self.kernel} / {linear.SPLITS}" if self.split else self.kernel


FUSED, NARROW = Way("narrow_norm", False), Way("narrow", False)


@dataclass(frozen=True)
class Figures:
    """What a site took for so many tokens, the norm before it included."""

    site: Site
    tokens: int
    chosen: Way  # by LinearKernels
    seconds: dict[Way, float | str]  # or what failed
    blocks: dict[Way, int]  # of the grids of those ways that may be split

    def best(self, *among: Way) -> float:
        """Of `among`, or of all: the least seconds in a step; infinite where none took them."""
        found = [each for way, each in self.seconds.items() if not among or way in among]
        return self.site.times * min((each for each in found if not isinstance(each, str)), default=float("inf"))


class Watched:
    """A module, and the way of its latest launch."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self.latest: Way | None = None

    def launch(self, kernel: str, grid: Grid, threads: int, shared_bytes: int, *arguments: Argument) -> None:
        self.latest = Way(kernel, grid[2] > 1)
        self._module.launch(kernel, grid, threads, shared_bytes, *arguments)


class Kernels:
    """LinearKernels as they choose, and made to do what is asked."""

    def __init__(self, load: Callable[[str], Module], device: torch.device) -> None:
        self.device = device
        self._load = load
        self._kernels = LinearKernels(load, device)

    def ways(self, weight: PackedLinear, tokens: int, normed: bool) -> list[Way]:
        few = ([FUSED] if normed else []) + [NARROW] if tokens <= linear.NARROW_MAX_TOKENS else []
        wide = [Way(kernel.name, split) for kernel in weight.wide if kernel.tokens >= tokens for split in (False, True)]
        return few + wide

    def blocks(self, way: Way, weight: PackedLinear, tokens: int) -> int:
        (kernel,) = (kernel for kernel in weight.wide if kernel.name == way.kernel)
        return self._kernels._blocks(kernel, tokens, weight)

    def chosen(self, inputs: "Inputs", weight: PackedLinear) -> Way:
        """The way that LinearKernels go by themselves."""
        watched = Watched(self._load(weight.source))
        usual = LinearKernels(lambda source: watched if source == weight.source else self._load(source), self.device)
        if inputs.site.epilogue == STORE:
            usual.norm_linear(inputs.residual, inputs.norm, EPS, weight)
        elif inputs.site.epilogue == SILU_MUL:
            usual.norm_linear_silu_mul(inputs.residual, inputs.norm, EPS, weight)
        elif inputs.site.epilogue == ADD:
            usual.add_linear(inputs.x, weight, inputs.out(weight))
        else:
            usual.head(inputs.x, weight)
        assert watched.latest is not None
        return watched.latest

    def run(self, way: Way, inputs: "Inputs", weight: PackedLinear, out: torch.Tensor) -> None:
        epilogue, tokens, kernels = inputs.site.epilogue, len(inputs.x), self._kernels
        if way == FUSED:
            kernels._narrow(way.kernel, tokens, weight, epilogue, out, None, (inputs.residual, inputs.norm, EPS))
            return
        x = kernels.rms_norm(inputs.residual, inputs.norm, EPS) if inputs.site.normed else inputs.x
        if way == NARROW:
            kernels._narrow(way.kernel, tokens, weight, epilogue, out, x, (None, None, 0.0))
        else:
            (kernel,) = (kernel for kernel in weight.wide if kernel.name == way.kernel)
            kernels._wide(kernel, linear.SPLITS if way.split else 1, weight, epilogue, out, x)


class Inputs:
    """What a site is given for so many tokens."""

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
    """Every way for each of `tokens`. One whose result is not the first one's to the bit has no time."""
    weights = [_packed(ops, site) for _ in range(products.cold_copies(site.shape, clock.device))]
    for count in tokens:
        inputs = Inputs(site, count, clock.device)
        ways = kernels.ways(weights[0], count, site.normed)
        wanted: torch.Tensor | None = None
        works: dict[Way, Callable[[], object] | str] = {}
        for way in ways:
            out = inputs.out(weights[0])
            fault = products.attempt(partial(kernels.run, way, inputs, weights[0], out))
            if isinstance(fault, str):
                works[way] = fault
                continue
            wanted = out.clone() if wanted is None else wanted
            if not torch.equal(out, wanted):
                works[way] = "differs"
                continue
            runs = [partial(kernels.run, way, inputs, weight, out) for weight in weights]
            works[way] = products.attempt(partial(captured, runs, clock.device))
        timed = {way: work for way, work in works.items() if not isinstance(work, str)}
        seconds: dict[Way, float | str] = {way: work for way, work in works.items() if isinstance(work, str)}
        for way, each in zip(timed, clock.medians(list(timed.values()), rounds=3), strict=True):
            seconds[way] = each / len(weights)
        blocks = {way: kernels.blocks(way, weights[0], count) for way in ways if way not in (FUSED, NARROW)}
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
    """What the choices in linear.py should be by the figures, over all products of a step."""

    norm_tokens: int  # up to which a fused norm is as fast as the best way with one of its own
    narrow_tokens: int  # up to which narrow is as fast as the best wide one
    split_below: int  # blocks of a grid: below, ranges of K in blocks of their own take the least in all
    steps: dict[int, tuple[float, float]]  # tokens → seconds of a step's products: as chosen now, and at best


def advice(figures: Sequence[Figures]) -> Advice:
    counts = sorted({each.tokens for each in figures})
    of = {count: [each for each in figures if each.tokens == count] for count in counts}

    def longest(holds: Callable[[int], bool]) -> int:
        return max(takewhile(holds, counts), default=0)

    def fused_pays(count: int) -> bool:
        normed = [each for each in of[count] if each.site.normed]
        others = sum(each.best(*(way for way in each.seconds if way != FUSED)) for each in normed)
        return sum(each.best(FUSED) for each in normed) <= others < float("inf")

    def narrow_pays(count: int) -> bool:
        wide = sum(each.best(*each.blocks) for each in of[count])
        return sum(each.best(NARROW) for each in of[count]) <= wide < float("inf")

    pairs = [
        (each.blocks[way], each.best(way), each.best(Way(way.kernel, True)))
        for each in figures
        for way in each.blocks
        if not way.split
    ]

    def cost(below: int) -> float:
        return sum(split if blocks < below else whole for blocks, whole, split in pairs if whole + split < float("inf"))

    thresholds = [0, *sorted({blocks + 1 for blocks, _, _ in pairs})]
    steps = {
        count: (sum(each.best(each.chosen) for each in of[count]), sum(each.best() for each in of[count]))
        for count in counts
    }
    return Advice(longest(fused_pays), longest(narrow_pays), min(thresholds, key=cost), steps)
