"""Every implementation of Ops that this machine can run, against the plain-torch oracle, on fresh random inputs."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from starling.model.awq import AwqWeight, pack, quantize
from starling.model.ops import Ops
from starling.model.ops.cpu import CpuOps, TorchCpuOps
from starling.model.ops.cpu.library import usable_instruction_sets
from starling.model.ops.reference import ReferenceOps
from tests.model.instruction_sets import instruction_sets, ops_of
from tests.model.paged import Piece, random_table, step

REFERENCE = ReferenceOps()


@dataclass(frozen=True)
class Candidate:
    make: Callable[[], Ops]
    linear: float  # error allowed in a linear layer, relative to outputs of its usual size
    other: float = 1e-5  # in everything else; more where the KV cache is fp16, for its rounding


CANDIDATES = {
    **{
        f"cpu-{isa}": Candidate(lambda isa=isa: CpuOps(2, "float32", torch.float32, isa), 3e-6)
        for isa in usable_instruction_sets()
    },
    **{
        f"cpu-{isa}-int16": Candidate(lambda isa=isa: ops_of(isa, 2, "int16", torch.float32), 1e-4)
        for isa in set(instruction_sets()) - set(usable_instruction_sets())
    },
    "cpu-int16": Candidate(lambda: CpuOps(2, "int16", torch.float32), 1e-4),
    "cpu-int8": Candidate(lambda: CpuOps(2, "int8", torch.float32), 4e-2),
    "cpu-auto-fp16-cache": Candidate(lambda: CpuOps(2, "auto", torch.float16), 4e-2, 2e-3),
    "torch-cpu": Candidate(lambda: TorchCpuOps(kv_dtype=torch.float16), 2e-2, 2e-3),
}


@pytest.fixture(params=CANDIDATES)
def candidate(request: pytest.FixtureRequest) -> Candidate:
    return CANDIDATES[request.param]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-9))


def linear_error(found: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> float:
    """Error of x @ matrix.T, relative to its expected norm: the actual norm of few outputs may be tiny by chance."""
    usual = x.norm() * matrix.norm() / matrix.shape[1] ** 0.5
    assert found.shape == (len(x), len(matrix))
    return float((found - x @ matrix.T).norm() / usual.clamp(min=1e-9))


def random_awq(inputs: int, outputs: int, group: int) -> AwqWeight:
    """Random words: every nibble, every zero point."""
    zeros = pack(torch.randint(0, 16, (inputs // group, outputs)))
    scales = (torch.rand(inputs // group, outputs) * 0.01 + 1e-3).to(torch.float16)
    return AwqWeight(pack(torch.randint(0, 16, (inputs, outputs))), zeros, scales)


@pytest.mark.parametrize(
    ("inputs", "outputs", "group"),
    [
        (4096, 512, 128),  # a slice of Starling's q|k|v and gate|up
        (14336, 128, 128),  # of its down projection
        (576, 960, 64),  # SmolLM2-135M: hidden to q|k|v
        (1536, 576, 64),
        (32, 8, 32),
        (96, 24, 32),
        (1280, 200, 128),
    ],
)
def test_awq_linear(candidate: Candidate, rng: random.Random, inputs: int, outputs: int, group: int) -> None:
    ops = candidate.make()
    weight = rng.choice([random_awq(inputs, outputs, group), quantize(torch.randn(outputs, inputs), group)])
    packed, exact = ops.pack_awq(weight), REFERENCE.pack_awq(weight)
    for tokens in (1, 2, rng.randint(3, 17), rng.randint(18, 70)):
        x = torch.randn(tokens, inputs) * torch.rand(tokens, 1) * 10
        prompt = torch.rand(tokens) < rng.random()
        found = ops.awq_linear(x, packed, prompt)
        assert linear_error(found, x, exact["weight"]) < candidate.linear


def test_awq_linear_of_a_whole_pass_and_more(candidate: Candidate, rng: random.Random) -> None:
    weight = random_awq(128, 48, 64)
    ops = candidate.make()
    x, prompt = torch.randn(700, 128), torch.rand(700) < 0.5
    assert linear_error(ops.awq_linear(x, ops.pack_awq(weight), prompt), x, weight.dequantize()) < candidate.linear


def test_awq_linear_of_zeros_and_of_huge_values(candidate: Candidate, rng: random.Random) -> None:
    weight = random_awq(128, 16, 128)
    ops = candidate.make()
    x = torch.zeros(3, 128)
    x[1] = torch.randn(128) * 1e15
    found = ops.awq_linear(x, ops.pack_awq(weight), torch.tensor([False, True, True]))
    assert (found[[0, 2]] == 0).all()
    assert linear_error(found, x, weight.dequantize()) < candidate.linear


@pytest.mark.parametrize(("vocabulary", "hidden"), [(32002, 64), (1003, 576), (17, 32), (512, 4096)])
def test_head(candidate: Candidate, rng: random.Random, vocabulary: int, hidden: int) -> None:
    ops = candidate.make()
    weight = torch.randn(vocabulary, hidden).to(torch.float16)
    x = torch.randn(rng.randint(1, 6), hidden)
    assert error(ops.head(x, ops.pack_head(weight)), REFERENCE.head(x, REFERENCE.pack_head(weight))) < candidate.linear


@pytest.mark.parametrize("hidden", [4096, 576, 40, 8])
def test_embedding_norms_and_activation(candidate: Candidate, rng: random.Random, hidden: int) -> None:
    ops = candidate.make()
    tokens = rng.choice([1, 2, 9])
    table = torch.randn(100, hidden).to(torch.float16)
    ids = torch.randint(0, 100, (tokens,))
    assert torch.equal(ops.embed(ids, table), table[ids].to(ops.dtype))
    sampled = torch.randint(0, 100, (3,), dtype=torch.int32)
    below = torch.where(torch.rand(tokens) < 0.5, -1 - torch.randint(3, (tokens,)), ids)
    wanted = [int(sampled[-1 - i]) if i < 0 else int(i) for i in below]
    assert torch.equal(ops.embed(below, table, sampled), table[wanted].to(ops.dtype))
    x, residual, weight = torch.randn(tokens, hidden), torch.randn(tokens, hidden) * 10, torch.randn(hidden).half()
    assert error(ops.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5)) < candidate.other
    wanted = REFERENCE.add_rms_norm(x, residual, weight, 1e-5)
    for found, want in zip(ops.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5), wanted, strict=True):
        assert error(found, want) < candidate.other
    gate_up = torch.randn(tokens, 2 * hidden) * 20
    assert error(ops.silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up)) < candidate.other


def test_inputs_may_be_strided(candidate: Candidate, rng: random.Random) -> None:
    """Every second element of the last dimension, against a contiguous copy."""
    ops, tokens, heads, kv_heads, dim = candidate.make(), 40, 8, 2, 64
    weight, table = ops.pack_awq(random_awq(512, 64, 128)), torch.randn(100, 32).half()
    head, rotary = ops.pack_head(torch.randn(64, 512).half()), torch.randn(64, dim)
    batch = step([Piece([1, 0, 2], 0, tokens)], 16)

    def results(cut: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(1)
        x, qkv = torch.randn(tokens, 1024), torch.randn(tokens, (heads + 2 * kv_heads) * dim * 2)
        prompt, ids, weights = (
            torch.rand(2 * tokens) < 0.5,
            torch.randint(0, 100, (2 * tokens,)),
            torch.randn(512).half(),
        )
        keys, values = torch.zeros(2, 3, kv_heads, 16, dim, dtype=ops.kv_dtype)
        q = ops.rotate_and_cache(cut(qkv), batch, rotary, keys, values)
        apart = torch.stack([q, q], dim=-1).view(tokens, heads, 2 * dim)
        settings = torch.tensor([[0.7, 0.9, 0.0, 0.3]], dtype=torch.float64).expand(tokens, 4).t().contiguous()
        top_k = torch.zeros(tokens, dtype=torch.int64)
        return [
            ops.awq_linear(cut(x), weight, cut(prompt)), ops.head(cut(x), head), ops.embed(cut(ids), table),
            ops.rms_norm(cut(x), weights, 1e-5), ops.silu_and_mul(cut(x)), keys, values, q,
            ops.attention(cut(apart), keys, values, batch, None),
            ops.sample(cut(x), settings[0], top_k, settings[1], settings[2], settings[3]),
        ]  # fmt: skip

    for found, wanted in zip(results(lambda t: t[..., ::2]), results(lambda t: t[..., ::2].contiguous()), strict=True):
        assert error(found.double(), wanted.double()) < candidate.other


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (4, 4, 16), (8, 1, 80), (6, 2, 8), (4, 2, 24)]
)
def test_rotary_and_attention(
    candidate: Candidate, rng: random.Random, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    """A mixed step: a long prompt's chunk, decodes near and far, drafts; blocks scattered over the cache."""
    ops = candidate.make()
    block_size, blocks = rng.choice([16, 32, 5]), 400
    free = list(range(blocks))
    pieces = []
    for start, count in [(0, rng.randint(1, 40)), (rng.randint(0, 700), 1), (rng.randint(100, 300), 3), (0, 1)]:
        pieces.append(Piece(random_table(rng, start + count, block_size, free), start, count))
    rng.shuffle(pieces)
    batch = step(pieces, block_size)
    cached = torch.randn(2, blocks, kv_heads, block_size, dim)
    cached[:, free] = torch.nan  # blocks that no request owns may hold anything
    rotary = torch.randn(1024, dim).clamp(-1, 1)
    qkv = torch.randn(batch.positions.numel(), (heads + 2 * kv_heads) * dim)

    keys, values = cached.clone()
    wanted_q = REFERENCE.rotate_and_cache(qkv, batch, rotary, keys, values)
    wanted = REFERENCE.attention(wanted_q, keys, values, batch, window)
    own_keys, own_values = cached.clone().to(ops.kv_dtype)
    q = ops.rotate_and_cache(qkv, batch, rotary, own_keys, own_values)
    assert error(q, wanted_q) < candidate.other
    taken = [block for block in range(blocks) if block not in free]
    assert error(own_keys[taken].float(), keys[taken]) < candidate.other
    assert error(own_values[taken].float(), values[taken]) < candidate.other
    assert error(ops.attention(q, own_keys, own_values, batch, window), wanted) < candidate.other
