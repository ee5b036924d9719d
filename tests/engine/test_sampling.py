"""Sampling: hand-computed tables, a distribution check, seed 0, and rows that ignore each other."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starling.engine.cache import BlockCache
from starling.engine.inputs import StepInputs, split
from starling.engine.sampling import rules, uniform
from starling.engine.scheduler import Work
from starling.engine.sequence import SamplingParams, Sequence
from starling.model.ops.reference import ReferenceOps

# Four tokens with p = 0.4, 0.3, 0.2, 0.1.
TABLE = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]


def draw(
    logits: list[float], u: float, temperature: float = 1, top_k: int = 0, top_p: float = 1, min_p: float = 0
) -> int:
    def one(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    rows = torch.tensor([logits])
    return int(ReferenceOps().sample(rows, one(temperature), one(top_k).long(), one(top_p), one(min_p), one(u)).item())


@pytest.mark.parametrize(
    ("settings", "draws"),
    [
        ({}, {0.0: 0, 0.39: 0, 0.41: 1, 0.69: 1, 0.71: 2, 0.89: 2, 0.91: 3, 0.999: 3}),
        ({"temperature": 0}, {0.0: 0, 0.999: 0}),
        ({"top_k": 2}, {0.0: 0, 0.56: 0, 0.58: 1, 0.999: 1}),  # 4/7, 3/7
        ({"top_k": 1}, {0.999: 0}),
        ({"top_p": 0.0}, {0.999: 0}),
        ({"top_p": 0.39}, {0.999: 0}),
        ({"top_p": 0.41}, {0.56: 0, 0.58: 1}),
        ({"top_p": 0.7}, {0.58: 1, 0.999: 1}),
        ({"top_p": 0.71}, {0.999: 2}),
        ({"min_p": 0.49}, {0.999: 2, 0.43: 0, 0.45: 1}),  # keeps p >= 0.2: 4/9, 3/9, 2/9
        ({"min_p": 1.0}, {0.999: 0}),
        ({"top_k": 3, "top_p": 0.5}, {0.999: 1}),  # top_p applies to what top_k left: 4/9 alone is below 0.5
        ({"temperature": 0.5}, {0.52: 0, 0.54: 1, 0.999: 3}),  # p squared: 16, 9, 4, 1 of 30
    ],
)
def test_against_a_table_computed_by_hand(settings: dict[str, float], draws: dict[float, int]) -> None:
    assert {u: draw(TABLE, u, **settings) for u in draws} == draws  # type: ignore[arg-type]


def test_equal_logits_go_to_the_lowest_id() -> None:
    assert draw([1.0, 2.0, 2.0], 0.9, temperature=0) == 1
    assert draw([2.0, 2.0, 2.0], 0.999, top_k=2) == 1
    assert draw([2.0, 2.0, 2.0], 0.999, top_p=0.5) == 1


def test_banned_tokens_are_never_drawn() -> None:
    assert draw([0.0, -math.inf, 0.0], 0.4999) == 0
    assert draw([0.0, -math.inf, 0.0], 0.5001) == 2


def work(params: SamplingParams, prompt: list[int], generated: list[int] = [], drafts: list[int] = []) -> Work:  # noqa: B006
    sequence = Sequence(0, prompt, params)
    sequence.tokens += generated
    return Work(sequence, len(sequence.tokens) - 1, 1, drafts, samples=True)


def params(**settings: float) -> SamplingParams:
    chosen = {"max_tokens": 100, "stop_ids": frozenset({3}), "seed": 0, "temperature": 1.0, **settings}
    return SamplingParams(**chosen)  # type: ignore[arg-type]


def shaped(logits: list[float], case: Work) -> list[float]:
    rows = torch.tensor([logits] * (1 + len(case.drafts)))
    for rule in rules([case]):
        rule.apply(rows)
    return [round(x, 6) for x in rows[-1].tolist()]


def sample(logits: torch.Tensor, plan: list[Work]) -> list[list[int]]:
    """Token ids by work; changes `logits` in place."""
    books = BlockCache(64, 16, rows=1, max_positions=16)
    inputs = StepInputs.of(plan, books)
    for rule in rules(plan):
        rule.apply(logits)
    settings = (inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, inputs.uniform)
    return split(plan, ReferenceOps().sample(logits, *map(torch.from_numpy, settings)).tolist())


def test_penalties_as_the_openai_api_and_ctrl_define_them() -> None:
    logits = [2.0, -2.0, 1.0, 0.5]
    tokens = {"prompt": [0, 1], "generated": [2, 2]}
    assert shaped(logits, work(params(frequency_penalty=0.5), **tokens)) == [2.0, -2.0, 0.0, 0.5]
    assert shaped(logits, work(params(presence_penalty=0.5), **tokens)) == [2.0, -2.0, 0.5, 0.5]
    assert shaped(logits, work(params(repetition_penalty=2.0), **tokens)) == [1.0, -4.0, 0.5, 0.5]
    everything = params(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=-0.25)
    assert shaped(logits, work(everything, **tokens)) == [1.0, -4.0, -0.25, 0.5]


def test_a_draft_counts_as_if_it_had_been_generated() -> None:
    setting = params(frequency_penalty=1.0, repetition_penalty=1.5, min_tokens=2)
    logits = [2.0, -2.0, 1.0, 0.5]
    assert shaped(logits, work(setting, [0], [2], drafts=[1])) == shaped(logits, work(setting, [0], [2, 1]))


def test_min_tokens_bans_the_end() -> None:
    assert shaped([0.0, 0.0, 0.0, 9.0], work(params(min_tokens=1), [0]))[3] == -math.inf
    assert shaped([0.0, 0.0, 0.0, 9.0], work(params(min_tokens=1), [0], [1]))[3] == 9.0


@given(st.integers(0, 2**32 - 1), st.integers(0, 8192))
def test_uniform_is_in_its_range(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0


class Allows:
    """A grammar's state: these tokens may follow."""

    fault = None

    def __init__(self, *tokens: int) -> None:
        self._bits = sum(1 << token for token in tokens)

    def mask(self) -> np.ndarray:
        return np.array([self._bits], dtype=np.int32)

    def advance(self, token: int) -> None: ...


def test_min_tokens_bans_the_end_unless_the_grammar_leaves_nothing_else() -> None:
    case = work(params(min_tokens=5), [0])
    for allows, left in (((1, 3), [1]), ((3,), [3]), ((0, 1, 2), [0, 1, 2])):
        case.sequence.constraint = Allows(*allows)
        assert [token for token, logit in enumerate(shaped([1.0] * 4, case)) if logit == 1] == left


def test_every_seed_and_every_position_draws_for_itself() -> None:
    draws = {uniform(seed, position) for seed in (0, 1, 2, 2**32 - 1, 2**63) for position in range(100)}
    assert len(draws) == 500


def chi_square(counts: Counter[int], expected: list[float], draws: int) -> float:
    return sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(expected))


@pytest.mark.parametrize("walk", ["positions of seed 0", "seeds at one position"])
def test_draws_follow_the_distribution(walk: str) -> None:
    draws = 4000
    counts: Counter[int] = Counter()
    for index in range(draws):
        u = uniform(0, index) if walk.startswith("positions") else uniform(index, 17)
        counts[draw(TABLE, u)] += 1
    # 3 degrees of freedom: 16.27 is exceeded once in a thousand; the draws are fixed, so the outcome is too.
    assert chi_square(counts, [0.4, 0.3, 0.2, 0.1], draws) < 16.27


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(seed := torch.seed() % 2**32)
    logits = torch.randn(6, 100) * 3
    cases = [
        work(
            params(seed=i, temperature=0.3 * i, top_p=0.9, top_k=i, min_p=0.01 * i, repetition_penalty=1 + i / 10),
            [i, 7],
        )
        for i in range(6)
    ]
    together = sample(logits.clone(), cases)
    alone = [sample(logits[i : i + 1].clone(), [case])[0] for i, case in enumerate(cases)]
    backwards = sample(logits.flip(0).clone(), cases[::-1])[::-1]
    assert together == alone == backwards, f"torch seed {seed}"


@pytest.mark.parametrize("top_k", [-1, 4, 2**31, 2**63, 10**400], ids=["off", "all", "2^31", "2^63", "no float64"])
def test_a_top_k_that_keeps_everything_changes_nothing(top_k: int) -> None:
    plan = [work(params(seed=seed, top_k=top_k), [1]) for seed in range(8)]
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert sample(logits.clone(), plan) == sample(logits, [work(params(seed=seed), [1]) for seed in range(8)])


def test_chunks_inside_a_prompt_sample_nothing() -> None:
    inside = Work(Sequence(0, [1, 2, 3], params()), 0, 2, [], samples=False)
    assert sample(torch.zeros(1, 4), [inside, work(params(temperature=0), [1])]) == [[], [0]]
