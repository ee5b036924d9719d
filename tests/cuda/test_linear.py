"""The CUDA linears, norms and output projection: on the emulated device at small shapes, on a GPU at Starling's.

Bounds. Weights are exact fp16 integers times float32 scales, products are exact in float32, and sums are float32 (on
tensor cores truncated, not rounded: 2^-23 instead of 2^-24). An output of K products s (q - z) x, each part of at most
4 + K / 64 + 4 sums, errs by less than (K / 64 + 24) 2^-23 sum |s (q - z) x|; if it is fp16, by half a unit of 2^-10 of
itself more (2^-25 for subnormals). These bounds hold for every single element, not for norms.
"""

import random
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch

from starling.model.awq import AwqWeight, pack, quantize
from starling.model.ops.cuda import linear
from starling.model.ops.cuda.linear import LinearKernels, PackedLinear
from starling.model.ops.reference import ReferenceOps
from tests.cuda.emulator import EmulatedModule
from tests.cuda.ptx import kernels_of

REFERENCE = ReferenceOps()
EPS = 1e-5
GUARD = 64  # elements on either side of an output that no kernel may touch


class Guarded(LinearKernels):
    """Outputs are full of NaN at first, and lie between guards that must not change."""

    def __init__(self, load: Callable[[str], object], device: torch.device) -> None:
        super().__init__(load, device)  # type: ignore[arg-type]
        self.outputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _empty(self, like: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return self.poisoned(like.shape[0], width, dtype)

    def poisoned(self, tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        size = tokens * width
        whole = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype, device=self.device)
        whole[:GUARD] = whole[GUARD + size :] = 7
        self.outputs.append((whole[:GUARD], whole[GUARD + size :]))
        return whole[GUARD : GUARD + size].view(tokens, width)

    def check_guards(self) -> None:
        assert all((part == 7).all() for pair in self.outputs for part in pair)
        self.outputs.clear()
        assert (self._counters == 0).all()


@pytest.fixture
def kernels() -> Guarded:
    return Guarded(EmulatedModule, torch.device("cpu"))


@pytest.fixture
def gpu_kernels() -> Guarded:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from starling.model.ops.cuda.driver import DriverModule

    device = torch.device("cuda", torch.cuda.current_device())
    return Guarded(lambda source: DriverModule.on_gpu(source, device), device)


def random_awq(inputs: int, outputs: int, group: int) -> AwqWeight:
    """Random words: every nibble, every zero point."""
    zeros = pack(torch.randint(0, 16, (inputs // group, outputs)))
    scales = (torch.rand(inputs // group, outputs) * 0.01 + 1e-3).to(torch.float16)
    return AwqWeight(pack(torch.randint(0, 16, (inputs, outputs))), zeros, scales)


def random_activations(tokens: int, width: int) -> torch.Tensor:
    """fp16, of widely different sizes and with a few outliers, as real ones are."""
    x = torch.randn(tokens, width) * torch.rand(tokens, 1) * 4
    return torch.where(torch.rand(tokens, width) < 2 / width, 100 * x, x).to(torch.float16)


def random_residual(tokens: int, width: int) -> torch.Tensor:
    """float32, with a first token so small that EPS matters."""
    residual = torch.randn(tokens, width) * 10
    residual[0] *= 1e-4
    return residual


def on(device: torch.device, weight: AwqWeight) -> AwqWeight:
    return AwqWeight(*(part.to(device) for part in (weight.qweight, weight.qzeros, weight.scales)))


def packed(kernels: LinearKernels, weight: AwqWeight, paired: bool = False) -> PackedLinear:
    return PackedLinear(linear.pack(on(kernels.device, weight), paired), kernels.device)


def wanted(x: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x @ matrix.T in float64, and how far off a float32 sum may be."""
    x, matrix = x.double(), matrix.double()
    bound = (x.shape[1] / 64 + 24) * 2**-23 * (x.abs() @ matrix.abs().T)
    return x @ matrix.T, bound


def rounded(exact: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """The bound after rounding to fp16."""
    return bound + (exact.abs() + bound) * 2**-11 + 2**-25


def check(found: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    assert found.shape == exact.shape
    error = (found.double().to(exact.device) - exact).abs()
    assert (error <= bound).all(), f"{float((error / bound).nan_to_num(torch.inf).max()):.2f} times the bound"


def check_linear(kernels: Guarded, weight: AwqWeight, tokens: int, paired: bool = False) -> None:
    """Every epilogue, and a token alone against the same one among others."""
    device = kernels.device  # which computes the expected values too: a CPU takes a minute at Starling's size
    x = random_activations(tokens, weight.in_features).to(device)
    w = packed(kernels, weight, paired)
    exact, bound = wanted(x, on(device, weight).dequantize())
    found = kernels.linear(x, w)
    check(found, exact, rounded(exact, bound))
    residual = torch.randn(tokens, weight.out_features, device=device)
    own = kernels.poisoned(tokens, weight.out_features, torch.float32)
    own.copy_(residual)
    assert kernels.add_linear(x, w, own) is own
    total = exact + residual
    check(own, total, bound + total.abs() * 2**-23)
    if paired:
        check_silu(kernels, kernels.linear_silu_mul(x, w), exact, bound)
    some = random.sample(range(tokens), min(3, tokens))
    for token in some:
        assert torch.equal(kernels.linear(x[token : token + 1], w), found[token : token + 1])
    assert torch.equal(kernels.linear(x[some], w), found[some])
    kernels.check_guards()


def check_silu(kernels: Guarded, found: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    gate, up = exact.chunk(2, dim=1)
    gate_bound, up_bound = bound.chunk(2, dim=1)
    silu = gate * gate.sigmoid()
    # silu's slope is within (-0.1, 1.1); exp and the quotient err by a few units of 2^-23, exp by one per unit of gate.
    silu_bound = 1.1 * gate_bound + silu.abs() * (8 + gate.abs()) * 2**-22
    product = silu * up
    check(found, product, rounded(product, silu_bound * up.abs() + (silu.abs() + silu_bound) * up_bound))


SHAPES = [
    (4096, 64, 128),  # rows of Starling's q|k|v and gate|up
    (14336, 32, 128),  # of its down projection
    (576, 192, 64),  # SmolLM2-135M: hidden to q|k|v
    (1536, 64, 64),
    (1536, 40, 32),
    (32, 8, 32),
    (96, 24, 32),
    (640, 200, 128),
]


@pytest.mark.parametrize(("inputs", "outputs", "group"), SHAPES)
@pytest.mark.parametrize("many", [False, True])
def test_linear(kernels: Guarded, rng: random.Random, inputs: int, outputs: int, group: int, many: bool) -> None:
    weight = rng.choice([random_awq(inputs, outputs, group), quantize(torch.randn(outputs, inputs), group)])
    most = 70 if inputs * outputs < 100_000 else 20
    check_linear(kernels, weight, rng.randint(9, most) if many else rng.randint(1, 8))


@pytest.mark.parametrize(("inputs", "half", "group"), [(1024, 24, 128), (576, 96, 64), (160, 8, 32)])
def test_linear_of_pairs(kernels: Guarded, rng: random.Random, inputs: int, half: int, group: int) -> None:
    for tokens in (1, rng.randint(2, 8), rng.randint(9, 40)):
        check_linear(kernels, random_awq(inputs, 2 * half, group), tokens, paired=True)


@pytest.mark.parametrize("group", linear.GROUPS)
@pytest.mark.parametrize("splits", [1, linear.SPLITS])
def test_kernels_agree_to_the_bit(kernels: Guarded, rng: random.Random, group: int, splits: int) -> None:
    """Every kernel, even where another would have been chosen, over several blocks of tokens and of rows."""
    inputs, outputs, tokens = 1152, 136, rng.randint(65, 72)
    w = packed(kernels, random_awq(inputs, outputs, group))
    x = random_activations(tokens, inputs)
    first = torch.cat([kernels.linear(x[i : i + 4], w) for i in range(0, tokens, 4)])
    for kernel in w.wide:
        out = kernels.poisoned(tokens, outputs, torch.float16)
        kernels._wide(kernel, splits, w, linear.STORE, out, x)
        assert torch.equal(out, first), kernel.name
    kernels.check_guards()


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "way"),
    [
        (5, 4096, 4096, ("wide_8", 4)),  # 32 blocks
        (8, 28672, 4096, ("wide_8", 1)),  # 224
        (64, 28672, 4096, ("wide_64", 1)),
        (128, 6144, 4096, ("wide_64_tall", 1)),  # 48 blocks at once; 96 of half the rows would take two waves
        (128, 4096, 14336, ("wide_64", 1)),  # 64 blocks at once; 128 quarters of twice the rows: as long, and more sums
        (192, 4096, 14336, ("wide_64", 4)),  # 384 quarters: 5 / 4 waves, where 96 blocks would take two
        (128, 28672, 4096, ("wide_64_tall", 1)),  # 224, three waves; quarters would take 11 / 4, and 117 MB of sums
        (256, 4096, 4096, ("wide_64_tall", 1)),  # 64 blocks at once; 128 of half the rows: two waves
    ],
)
def test_what_84_processors_are_given(tokens: int, rows: int, columns: int, way: tuple[str, int]) -> None:
    kernels = LinearKernels(EmulatedModule, torch.device("cpu"))
    shape = {"shape": torch.tensor([rows, columns, 128, 0])}
    kernel, splits = kernels._choose(tokens, PackedLinear(shape, torch.device("cpu")))
    assert (kernel.name, splits) == way


@pytest.mark.parametrize(("vocabulary", "hidden"), [(1003, 64), (130, 576), (17, 32), (40, 4096)])
def test_head(kernels: Guarded, rng: random.Random, vocabulary: int, hidden: int) -> None:
    matrix = torch.randn(vocabulary, hidden).to(torch.float16)
    w = PackedLinear(linear.pack_head(matrix), kernels.device)
    for tokens in (1, rng.randint(2, 8), rng.randint(9, 16), rng.randint(17, 70) if hidden < 4096 else 20):
        check_head(kernels, matrix, w, tokens)


def check_head(kernels: Guarded, matrix: torch.Tensor, w: PackedLinear, tokens: int) -> None:
    x = random_activations(tokens, matrix.shape[1]).to(kernels.device)
    exact, bound = wanted(x, matrix.to(kernels.device))
    found = kernels.head(x, w)
    assert found.dtype == torch.float32
    check(found, exact, bound)
    token = random.randrange(tokens)
    assert torch.equal(kernels.head(x[token : token + 1], w)[0], found[token])
    kernels.check_guards()


@pytest.mark.parametrize(("inputs", "half", "group"), [(4096, 16, 128), (576, 48, 64), (96, 8, 32)])
def test_fused_norm(kernels: Guarded, rng: random.Random, inputs: int, half: int, group: int) -> None:
    w = packed(kernels, random_awq(inputs, 2 * half, group), paired=True)
    check_fused_norm(kernels, w)


def check_fused_norm(kernels: Guarded, w: PackedLinear) -> None:
    """Against the norm in a kernel of its own, to the bit; also for more tokens than it is ever given."""
    norm = torch.randn(w.columns).half().to(kernels.device)
    for tokens in (1, 2, 3, 8):
        residual = random_residual(tokens, w.columns).to(kernels.device)
        x = kernels.rms_norm(residual, norm, EPS)
        for fused, plain in (
            (kernels.norm_linear(residual, norm, EPS, w), kernels.linear(x, w)),
            (kernels.norm_linear_silu_mul(residual, norm, EPS, w), kernels.linear_silu_mul(x, w)),
        ):
            assert not plain.isnan().any() and torch.equal(fused, plain)
        out = kernels.poisoned(tokens, w.rows, torch.float16)
        if tokens * w.columns <= 5 * 4096:  # shared memory
            kernels._narrow("narrow_norm", tokens, w, linear.STORE, out, None, (residual, norm, EPS))
            assert torch.equal(out, kernels.linear(x, w))
    kernels.check_guards()


@pytest.mark.parametrize("hidden", [4096, 576, 40, 8])
def test_norms(kernels: Guarded, rng: random.Random, hidden: int) -> None:
    check_norms(kernels, rng.choice([1, 2, 9]), hidden)


def check_norms(kernels: Guarded, tokens: int, hidden: int) -> None:
    """float32 errs by a few units of 2^-23, so rounding to fp16 may go the other way, before the multiplication and
    after it: each time by a unit, of at most 2^-10 or, for subnormals, 2^-24.
    """
    device = kernels.device
    x, residual, norm = torch.randn(tokens, hidden).half(), random_residual(tokens, hidden), torch.randn(hidden).half()
    least = (norm.double().abs() + 1) * 2**-24
    exact = REFERENCE.rms_norm(residual, norm, EPS).double()
    found = kernels.rms_norm(residual.to(device), norm.to(device), EPS)
    check(found, exact, exact.abs() * 2**-8.99 + least)
    exact, total = REFERENCE.add_rms_norm(x.float(), residual, norm, EPS)
    own = kernels.poisoned(tokens, hidden, torch.float32)
    own.copy_(residual)
    found = kernels.add_rms_norm(x.to(device), own, norm.to(device), EPS)
    check(found, exact.double(), exact.double().abs() * 2**-8.99 + least)
    assert torch.equal(own.cpu(), total)
    kernels.check_guards()


def test_nothing_to_do(kernels: Guarded) -> None:
    w = packed(kernels, random_awq(128, 16, 128), paired=True)
    norm, none = torch.ones(128).half(), torch.empty(0, 128)
    assert kernels.linear(none.half(), w).shape == (0, 16)
    assert kernels.norm_linear_silu_mul(none, norm, EPS, w).shape == (0, 8)
    assert kernels.rms_norm(none, norm, EPS).shape == kernels.add_rms_norm(none.half(), none, norm, EPS).shape


def test_packed_weights_come_back(kernels: Guarded) -> None:
    w = packed(kernels, random_awq(640, 48, 128), paired=True)
    again = PackedLinear(dict(w), kernels.device)
    assert (again.rows, again.columns, again.group, again.paired) == (48, 640, 128, True)
    x = random_activations(2, 640)
    assert torch.equal(kernels.linear_silu_mul(x, again), kernels.linear_silu_mul(x, w))


def test_the_weights_of_a_layer_take_4_156_bits() -> None:
    w = linear.pack(random_awq(4096, 512, 128))
    assert sum(w[part].nbytes for part in ("weight", "scales")) * 8 == 4096 * 512 * 4.15625


def test_an_unknown_group_size_is_an_error() -> None:
    with pytest.raises(linear.DeviceError, match="256"):
        linear.pack(random_awq(256, 16, 256))


# -- what the compiler made of it ---------------------------------------------------------------------------------

SOURCES = ("linear_g128", "linear_g64", "linear_g32", "head")


@pytest.mark.parametrize("group", [128, 32])
def test_shared_memory_is_free_of_bank_conflicts(group: int) -> None:
    """Except where the compiler splits a load of 16 bytes in two, which costs one of the kernels 2%."""
    module = EmulatedModule(f"linear_g{group}")
    kernels = LinearKernels(lambda _source: module, torch.device("cpu"))
    w = packed(kernels, random_awq(1024, 192, group))
    for tokens in (1, 3, 8, 12, 32, 64, 200):
        x = random_activations(tokens, 1024)
        found = module.count(partial(kernels.linear, x, w))
        assert found.least > 1000
        assert found.taken <= 1.04 * found.least


@pytest.mark.parametrize("source", SOURCES)
def test_weights_and_activations_come_16_bytes_at_a_time(source: str) -> None:
    for entry in kernels_of(source, 86):
        name = re.match(r"\w+", entry)
        assert name is not None
        copies = re.findall(r"cp\.async\.(\S+) \[[^\]]*\], \[[^\]]*\], (\d+)", entry)
        assert {(kind.removesuffix(".L2::cache_hint"), size) for kind, size in copies} == {
            ("cg.shared.global", "16")
        }, name[0]
        assert "mma.sync" in entry and ".local" not in entry, name[0]
        if name[0] == "narrow":  # loads activations itself, and nothing else from global memory but what it adds to
            loads = re.findall(r"ld\.global\S*", entry)
            assert {load for load in loads if ".v4" in load} and set(loads) <= {"ld.global.v4.u32", "ld.global.f32"}


@pytest.mark.parametrize("group", [*linear.GROUPS, 0])
def test_shared_memory_fits(group: int) -> None:
    """An A40 has 100 KiB per multiprocessor, of which each block takes 1 KiB more than it asks for."""
    assert all(kernel.shared_bytes(group) <= 99 << 10 for kernel in linear.wide_kernels(group))


# -- on a GPU -----------------------------------------------------------------------------------------------------

STARLING = [(6144, 4096, False), (4096, 4096, False), (28672, 4096, True), (4096, 14336, False)]


@pytest.mark.gpu
@pytest.mark.parametrize(("outputs", "inputs", "paired"), STARLING)
def test_linear_of_starling(gpu_kernels: Guarded, rng: random.Random, outputs: int, inputs: int, paired: bool) -> None:
    weight = random_awq(inputs, outputs, 128)
    for tokens in (1, 2, rng.randint(3, 8), rng.randint(9, 32), rng.randint(33, 64), rng.randint(65, 700)):
        check_linear(gpu_kernels, weight, tokens, paired)


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "outputs", "group"), SHAPES)
def test_linear_of_small_shapes_on_a_gpu(
    gpu_kernels: Guarded, rng: random.Random, inputs: int, outputs: int, group: int
) -> None:
    for tokens in (1, rng.randint(2, 8), rng.randint(9, 64), rng.randint(65, 300)):
        check_linear(gpu_kernels, random_awq(inputs, outputs, group), tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [32002, 49152])
def test_head_of_starling(gpu_kernels: Guarded, rng: random.Random, vocabulary: int) -> None:
    matrix = torch.randn(vocabulary, 4096 if vocabulary == 32002 else 576).half()
    w = PackedLinear(linear.pack_head(matrix.to(gpu_kernels.device)), gpu_kernels.device)
    for tokens in (1, rng.randint(2, 8), rng.randint(9, 64), rng.randint(65, 150)):
        check_head(gpu_kernels, matrix, w, tokens)


@pytest.mark.gpu
def test_norms_of_starling(gpu_kernels: Guarded, rng: random.Random) -> None:
    w = packed(gpu_kernels, random_awq(4096, 28672, 128), paired=True)
    check_fused_norm(gpu_kernels, w)
    check_norms(gpu_kernels, rng.randint(1, 3000), 4096)
