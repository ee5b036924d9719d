"""Every implementation of the sampling operation against the oracle, on fresh random logits."""

import itertools
import random

import pytest
import torch

from starling.model.ops.cpu import CpuOps
from starling.model.ops.cpu.library import usable_instruction_sets
from starling.model.ops.reference import ReferenceOps

Settings = tuple[float, int, float, float, float]  # temperature, top_k, top_p, min_p, uniform


@pytest.fixture(params=usable_instruction_sets())
def ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(isa=request.param)


def sample(ops: CpuOps | ReferenceOps, logits: torch.Tensor, settings: list[Settings]) -> list[int]:
    temperature, top_k, top_p, min_p, uniform = torch.tensor(settings, dtype=torch.float64).t().contiguous()
    return ops.sample(logits, temperature, top_k.long(), top_p, min_p, uniform).tolist()


def random_settings(dice: random.Random) -> Settings:
    return (
        dice.choice([0.0, 5e-324, 1e-40, 0.01, 0.3, 0.7, 1.0, 5.0]),
        dice.choice([0, 0, 1, 2, 40, 1000]),
        dice.choice([0.0, 0.1, 0.5, 0.9, 0.95, 1.0, 1.0]),
        dice.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
        # Nearer to 0 or 1, the token is decided by probabilities that float32 cannot hold.
        dice.choice([1e-3, 1 - 1e-3, dice.random(), dice.random()]),
    )


def nudged(settings: Settings) -> list[Settings]:
    """The settings moved by what float32 may move a probability; at a boundary either side is right."""
    temperature, top_k, top_p, min_p, uniform = settings
    moves = (-1e-5, 0.0, 1e-5)
    top_ps = [min(1.0, max(0.0, top_p + move)) for move in moves] if top_p < 1 else [1.0]
    min_ps = [max(0.0, min_p + move) for move in moves]
    uniforms = [min(max(0.0, uniform + move), 1 - 2**-53) for move in moves]
    return [(temperature, top_k, *rest) for rest in itertools.product(top_ps, min_ps, uniforms)]


@pytest.mark.parametrize("vocabulary", [1, 7, 16, 331, 32002])
def test_draws_are_the_oracles(ops: CpuOps, vocabulary: int) -> None:
    dice = random.Random(seed := random.SystemRandom().randrange(2**32))
    generator = torch.Generator().manual_seed(seed)
    rows = 24
    logits = torch.randn(rows, vocabulary, generator=generator) * torch.rand(rows, 1, generator=generator) * 8
    logits[torch.rand(rows, vocabulary, generator=generator) < 0.02] = -torch.inf
    logits[:, dice.randrange(vocabulary)] = 3.0  # at least one is finite
    settings = [random_settings(dice) for _ in range(rows)]
    found, expected = sample(ops, logits, settings), sample(ReferenceOps(), logits, settings)
    for row, (mine, oracle) in enumerate(zip(found, expected, strict=True)):
        if mine != oracle:
            near = nudged(settings[row])
            allowed = sample(ReferenceOps(), logits[row].expand(len(near), -1), near)
            assert mine in allowed, f"seed {seed}, row {row}, {settings[row]}"


def test_equal_probabilities_rank_by_id(ops: CpuOps) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0, 0.0]])
    last = 1 - 2**-53
    assert sample(ops, logits, [(0.0, 0, 1.0, 0.0, last)]) == [1]
    assert sample(ops, logits, [(1.0, 2, 1.0, 0.0, last)]) == [2]
    assert sample(ops, logits, [(1.0, 0, 0.5, 0.0, last)]) == [2]
    assert sample(ops, logits, [(1.0, 0, 1.0, 1.0, last)]) == [3]
    assert sample(ops, torch.zeros(1, 40), [(1.0, 7, 1.0, 0.0, last)]) == [6]


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-39, 1e-300, 5e-324])
def test_a_temperature_next_to_0_is_greedy(ops: CpuOps, temperature: float) -> None:
    logits = torch.tensor([[1.0, -torch.inf, 5.0, 4.999, -80.0, 0.0]])
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (2, 1.0, 0.0), (0, 0.95, 0.0), (0, 1.0, 0.1)):
        assert sample(ops, logits, [(temperature, top_k, top_p, min_p, 0.999)]) == [2]


def test_draws_follow_the_distribution(ops: CpuOps) -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    draws = 20_000
    uniform = (torch.arange(draws) + 0.5) / draws
    settings: list[Settings] = [(1.0, 0, 1.0, 0.0, float(u)) for u in uniform]
    counts = torch.tensor(sample(ops, p.log().expand(draws, -1).contiguous(), settings)).bincount(minlength=4)
    assert torch.allclose(counts / draws, p, atol=2e-4)
