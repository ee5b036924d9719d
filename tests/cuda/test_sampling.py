"""From logits to ids on the device: shaping against the engine's torch expressions, draws against the oracle."""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.engine.sampling import uniform
from starling.errors import DeviceError
from starling.model.ops.cuda.driver import DriverModule
from starling.model.ops.cuda.sampling import SETTINGS, SamplingKernels, settings_of
from starling.model.ops.reference import ReferenceOps
from tests.cuda.emulator import EmulatedModule

Settings = tuple[float, int, float, float, float]  # temperature, top_k, top_p, min_p, uniform
EPSILON = 2.0**-24  # half a unit in the last place of a float32
LAST = 1 - 2.0**-53


@dataclass(frozen=True)
class Device:
    """Where the kernels run, and how many rows and ids they are checked with there."""

    device: torch.device
    rows: int
    vocabularies: tuple[int, ...]

    def kernels(self, rows: int, vocabulary: int, sequences: int = 1) -> SamplingKernels:
        load = EmulatedModule if self.device.type == "cpu" else lambda source: DriverModule.on_gpu(source, self.device)
        return SamplingKernels(load, self.device, rows, vocabulary, sequences)


EMULATED = Device(torch.device("cpu"), 12, (1, 7, 16, 331, 32002))


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def on(request: pytest.FixtureRequest) -> Device:
    if request.param == "emulated":
        return EMULATED
    return Device(torch.device("cuda"), 64, (7, 32002, 49152))


def arguments(rows: list[Settings]) -> tuple[torch.Tensor, ...]:
    temperature, top_k, top_p, min_p, draws = torch.tensor(rows, dtype=torch.float64).t().contiguous()
    return temperature, top_k.long(), top_p, min_p, draws


def packed(rows: list[Settings]) -> np.ndarray:
    return settings_of(*(argument.numpy() for argument in arguments(rows)))


def upload(on: Device, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows.view(np.uint8).reshape(len(rows), SETTINGS.itemsize)).to(on.device)


def ints(on: Device, values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=on.device)


def sample(on: Device, logits: torch.Tensor, rows: list[Settings]) -> list[int]:
    """Draw without shaping, from rows that lie between rows of NaN; the rest of the results must stay as it was."""
    count, vocabulary = logits.shape
    kernels = on.kernels(count + 2, vocabulary)
    kernels.results.fill_(-7)
    around = torch.full((count + 2, vocabulary), math.nan, device=on.device)
    around[1:-1] = logits
    given = around[1:-1].clone()
    ids = kernels.sample(around[1:-1], upload(on, packed(rows))).tolist()
    assert torch.equal(around[1:-1], given)
    assert kernels.results[:, count:].eq(-7).all()
    assert kernels.results[1, :count].eq(0).all()
    return ids


def oracle(logits: torch.Tensor, rows: list[Settings]) -> list[int]:
    return ReferenceOps().sample(logits, *arguments(rows)).tolist()


def is_clear(logits: torch.Tensor, setting: Settings) -> bool:
    """Whether no rounding in the kernels can change this draw; if one can, either side of the boundary is right.

    With a = (max - l) / T: the float32 exponent errs by at most 3 EPSILON a (subtraction, 1 / T, product), the
    exponential by 2 EPSILON more, and a weight loses up to 2^-47 in becoming an integer. A share of a kept sum then
    errs by at most the mean of those relative errors, weighted by what is kept. min_p compares logits, in float64.
    """
    temperature, top_k, top_p, min_p, draw = setting
    if temperature == 0:
        return True
    x = (logits.double() - logits.max()) / temperature
    p = x.exp()
    if min_p > 0 and bool((x - math.log(min_p)).abs().lt(1e-9).any()) and min_p < 1:
        return False
    errors = torch.where(p > 0, p * (3 * x.abs() + 2) * EPSILON, 0) + 2.0**-47
    order = logits.argsort(descending=True, stable=True)
    ranked = p[order]
    kept = ranked >= min_p
    if top_k > 0:
        kept[top_k:] = False
    ranked, errors = ranked[kept], errors[order[kept]]
    bound = 1.01 * float(errors.sum() / ranked.sum())
    if top_p < 1:
        before = (ranked.cumsum(0) - ranked) / ranked.sum()
        if (before[1:] - top_p).abs().le(bound).any():
            return False
        ranked, errors = ranked[(before < top_p) | (before == 0)], errors[(before < top_p) | (before == 0)]
        bound = 1.01 * float(errors.sum() / ranked.sum())
    left = torch.zeros_like(p)
    left[order[: len(ranked)]] = ranked
    shares = (left.cumsum(0) / left.sum())[left > 0]
    return not bool((shares - draw).abs().le(bound).any())


def random_setting(rng: random.Random) -> Settings:
    return (
        rng.choice([0.0, 0.01, 0.3, 0.7, 1.0, 5.0]),
        rng.choice([0, 0, 1, 2, 40, 1000, 20000]),
        rng.choice([0.0, 0.1, 0.5, 0.9, 0.95, 1.0, 1.0, rng.random()]),
        rng.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
        rng.choice([0.0, 1e-3, 1 - 1e-3, rng.random(), rng.random()]),
    )


def clear_setting(rng: random.Random, logits: torch.Tensor, draw: Callable[[random.Random], Settings]) -> Settings:
    for _ in range(1000):
        setting = draw(rng)
        if is_clear(logits, setting):
            return setting
    raise AssertionError("every draw falls on a boundary")


DISTRIBUTIONS: dict[str, Callable[[int], torch.Tensor]] = {
    "like a model's": lambda v: torch.randn(v) * 3,
    "peaked": lambda v: torch.randn(v) + 30 * (torch.arange(v) == v // 3),
    "flat": lambda v: torch.randn(v) * 1e-3,
    "tied": lambda v: torch.full((v,), -2.5),
    "of two values": lambda v: torch.randint(0, 2, (v,)).float(),
    "of few values": lambda v: torch.randint(-20, 3, (v,)) / 8,
    "around zero": lambda v: torch.randn(v) * torch.randint(-1, 2, (v,)),
    "wide": lambda v: torch.randn(v) * 1e4,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_are_the_oracles(on: Device, name: str, rng: random.Random) -> None:
    for vocabulary in on.vocabularies:
        rows = on.rows if vocabulary < 1000 or on.rows > 12 else 3
        logits = torch.stack([DISTRIBUTIONS[name](vocabulary) for _ in range(rows)])
        logits[torch.rand(rows, vocabulary) < 0.02] = -math.inf
        logits[:, rng.randrange(vocabulary)] = 2.0 if name != "wide" else 3e4  # at least one is finite
        chosen = [clear_setting(rng, row, random_setting) for row in logits]
        assert sample(on, logits, chosen) == oracle(logits, chosen), chosen


@pytest.mark.parametrize("vocabulary", [32002, 49152, 65536])
def test_ties_are_cut_by_id(on: Device, vocabulary: int) -> None:
    """The last token that is kept, which takes all digits of logit and id together to find."""
    cut = vocabulary - 12345
    rows: list[Settings] = [(1.0, cut, 1.0, 0.0, LAST), (0.7, 0, (cut - 0.5) / vocabulary, 0.0, LAST)]
    assert sample(on, torch.zeros(2, vocabulary), rows) == [cut - 1] * 2
    below = torch.full((1, vocabulary), -(2.0**-24))  # weights of 2^47 - 2^23: the low halves of their sums overflow
    below[0, 0] = 0
    assert sample(on, below, [(1.0, *rows[1][1:])]) == [cut - 1]
    lower = torch.zeros(1, vocabulary)
    lower[0, ::3] = -1e-7  # in the same bin
    upper = vocabulary - len(range(0, vocabulary, 3))
    assert sample(on, lower, [(1.0, upper + 100, 1.0, 0.0, LAST)]) == oracle(
        lower, [(1.0, upper + 100, 1.0, 0.0, LAST)]
    )
    # top_p of what top_k left: half of the upper ones.
    both: Settings = (1.0, upper, 0.5 - 1e-6, 0.0, LAST)
    assert sample(on, lower, [both]) == oracle(lower, [both])


def test_every_part_of_a_long_row_is_reached(on: Device, rng: random.Random) -> None:
    for vocabulary in (1024, 1025, 49152, 65536):
        wanted = [0, 1023, vocabulary - 1, rng.randrange(vocabulary), rng.randrange(vocabulary)]
        logits = torch.zeros(len(wanted), vocabulary)
        assert sample(on, logits, [(1.0, 0, 1.0, 0.0, (i + 0.5) / vocabulary) for i in wanted]) == wanted


def test_the_least_draw_is_the_first_token_that_weighs(on: Device) -> None:
    """Whatever weighs nothing ahead of it: ids, whole chunks, and one of a lane's two chunks."""
    firsts = [0, 5, 1023, 1024, 1500, 2048, 3077]
    logits = torch.zeros(len(firsts), 3100)
    for row, first in zip(logits, firsts, strict=True):
        row[:first] = -math.inf
    for setting in ((1.0, 0, 1.0, 0.0, 0.0), (1.0, 20, 1.0, 0.0, 0.0), (1.0, 0, 0.5, 0.0, 0.0)):
        assert sample(on, logits, [setting] * len(firsts)) == firsts


def test_a_logit_next_to_the_least_of_min_p(on: Device) -> None:
    """The float32 nearest to log(min_p) is kept unless it lies below."""
    least = [0.03 * i for i in range(1, 31)]
    logits = torch.tensor([[0.0, math.log(min_p)] for min_p in least])
    wanted = [int(float(logit) >= math.log(min_p)) for logit, min_p in zip(logits[:, 1], least, strict=True)]
    assert 5 < sum(wanted) < 25
    assert sample(on, logits, [(1.0, 0, 1.0, min_p, LAST) for min_p in least]) == wanted


def test_a_vocabulary_that_ranks_cannot_hold_is_an_error() -> None:
    with pytest.raises(DeviceError, match=r"128256 tokens.*at most 65536"):
        EMULATED.kernels(1, 128256)


# Four tokens with p = 0.4, 0.3, 0.2, 0.1.
TABLE = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]


@pytest.mark.parametrize(
    ("of", "draws"),
    [
        ((1, 0, 1, 0), {0.0: 0, 0.39: 0, 0.41: 1, 0.69: 1, 0.71: 2, 0.89: 2, 0.91: 3, 0.999: 3}),
        ((0, 0, 1, 0), {0.0: 0, 0.999: 0}),
        ((1, 2, 1, 0), {0.0: 0, 0.56: 0, 0.58: 1, 0.999: 1}),  # 4/7, 3/7
        ((1, 1, 1, 0), {0.999: 0}),
        ((1e-300, 0, 1, 0), {0.999: 0}),  # 1 / temperature is more than a float32 holds
        ((1, 0, 0, 0), {0.999: 0}),
        ((1, 0, 0.39, 0), {0.999: 0}),
        ((1, 0, 0.41, 0), {0.56: 0, 0.58: 1}),
        ((1, 0, 0.71, 0), {0.999: 2}),
        ((1, 0, 1, 0.49), {0.999: 2, 0.43: 0, 0.45: 1}),  # keeps p >= 0.2: 4/9, 3/9, 2/9
        ((1, 0, 1, 1.0), {0.999: 0}),
        ((1, 3, 0.5, 0), {0.999: 1}),  # top_p is of what top_k left: 4/9 alone is below 0.5
        ((0.5, 0, 1, 0), {0.52: 0, 0.54: 1, 0.999: 3}),  # p squared: 16, 9, 4, 1 of 30
    ],
)
def test_against_a_table_computed_by_hand(
    on: Device, of: tuple[float, int, float, float], draws: dict[float, int]
) -> None:
    found = sample(on, torch.tensor([TABLE] * len(draws)), [(*of, u) for u in draws])
    assert dict(zip(draws, found, strict=True)) == draws


def test_equal_logits_go_to_the_lowest_id(on: Device) -> None:
    zeros = torch.tensor([-0.0, 0.0, -1.0])
    assert sample(on, zeros.expand(1, 3), [(0.0, 0, 1.0, 0.0, LAST)]) == [0]
    assert sample(on, zeros.expand(2, 3), [(1.0, 1, 1.0, 0.0, LAST), (1.0, 2, 1.0, 0.0, LAST)]) == [0, 1]
    ties = torch.tensor([1.0, 5.0, 5.0, 5.0, 0.0])
    wanted = {(0.0, 0, 1.0, 0.0): 1, (1.0, 2, 1.0, 0.0): 2, (1.0, 0, 0.5, 0.0): 2, (1.0, 0, 1.0, 1.0): 3}
    assert sample(on, ties.expand(4, 5), [(*s, LAST) for s in wanted]) == list(wanted.values())
    shares = [0.25, 0.5, 0.75]  # of four equals: what reaches top_p exactly is enough
    assert sample(on, torch.zeros(3, 4), [(1.0, 0, share, 0.0, LAST) for share in shares]) == [0, 1, 2]
    apart = torch.tensor([[-(2.0**-149), 0.0]])  # of equal weight: the larger logit ranks first all the same
    assert sample(on, apart, [(0.05, 0, 0.0, 0.0, 0.0)]) == oracle(apart, [(0.05, 0, 0.0, 0.0, 0.0)]) == [1]


@settings(max_examples=25)
@given(st.data())
def test_every_combination_of_filters(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(1, 40))
    values = st.sampled_from([-math.inf, -9.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1.0 + 2**-23, 4.0]) | st.floats(
        -50, 50, width=32
    )
    count = data.draw(st.integers(1, 4))
    logits = torch.tensor(
        data.draw(
            st.lists(
                st.lists(values, min_size=vocabulary, max_size=vocabulary).filter(lambda row: max(row) > -math.inf),
                min_size=count,
                max_size=count,
            )
        )
    )
    of_row = st.tuples(
        st.sampled_from([0.0, 0.05, 1.0]) | st.floats(0.01, 5),
        st.integers(0, vocabulary + 1),
        st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
        st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
        st.floats(0, LAST),
    )
    rows = [data.draw(of_row.filter(lambda setting, row=row: is_clear(row, setting))) for row in logits]
    assert sample(EMULATED, logits, rows) == oracle(logits, rows)


def test_draws_follow_the_distribution(on: Device) -> None:
    """With seed 0. 3 degrees of freedom: 16.27 is exceeded once in a thousand; the draws are fixed."""
    draws = 160
    rows: list[Settings] = [(1.0, 0, 1.0, 0.0, uniform(0, position)) for position in range(draws)]
    counts = Counter(sample(on, torch.tensor([TABLE]).expand(draws, 4), rows))
    expected = [draws * math.exp(logit) for logit in TABLE]
    assert sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected)) < 16.27


def test_a_row_is_the_same_alone_and_among_others(on: Device, rng: random.Random) -> None:
    logits = torch.randn(6, 2500) * 3
    rows = [(1.0, rng.choice([0, 50]), rng.choice([0.9, 1.0]), 0.0, rng.random()) for _ in logits]
    together = sample(on, logits, rows)
    assert together == [sample(on, logits[i : i + 1], rows[i : i + 1])[0] for i in range(6)]
    assert together == sample(on, logits.flip(0), rows[::-1])[::-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_token_is_a_fault_and_its_id_valid(on: Device, temperature: float) -> None:
    logits = torch.randn(6, 1500, device=on.device)
    logits[0, 1234] = math.nan
    logits[1] = math.nan
    logits[2, 77] = math.inf
    logits[3] = -math.inf
    logits[4, 7:] = -math.inf
    logits[4, 8] = -math.nan
    kernels = on.kernels(6, 1500)
    rows: list[Settings] = [(temperature, 5, 0.9, 0.1, 0.5)] * 6
    ids = kernels.sample(logits, upload(on, packed(rows)))
    assert kernels.results[1].tolist() == [1, 1, 1, 1, 1, 0]
    assert ids[:5].tolist() == [0] * 5
    assert ids[5].item() == oracle(logits[5:].cpu(), rows[:1])[0]


def test_padding_is_harmless(on: Device) -> None:
    kernels = on.kernels(4, 300, sequences=2)
    logits = torch.randn(4, 300, device=on.device)
    logits[2:] = math.nan
    given = logits.clone()
    rows = np.zeros(4, dtype=SETTINGS)
    ids = kernels.sample(logits, upload(on, rows), ints(on, [5] * 4))
    assert ids[:2].tolist() == given[:2].argmax(1).tolist()
    assert ids[2:].tolist() == [0, 0]
    assert torch.equal(logits.nan_to_num(9), given.nan_to_num(9))
    assert not kernels._table.any()


# -- shaping --------------------------------------------------------------------------------------------------------


@dataclass
class Penalised:
    """A sequence as the host knows it: all of its tokens, and how many of them are in the table."""

    repetition: float
    frequency: float
    presence: float
    prompt: list[int]
    generated: list[int] = field(default_factory=list)
    counted: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.generated

    def shape(self, logits: torch.Tensor, drafts: list[int]) -> torch.Tensor:
        """The engine's penalties (engine/sampling.py), in torch on the CPU."""
        logits = logits.clone()
        seen = torch.tensor(sorted(set(self.tokens) | set(drafts)))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / self.repetition, values * self.repetition)
        ids, counts = torch.unique(torch.tensor(self.generated + drafts, dtype=torch.int64), return_counts=True)
        logits[ids] -= self.frequency * counts + self.presence
        return logits


def penalised(rng: random.Random, vocabulary: int) -> Penalised:
    few = [rng.randrange(vocabulary) for _ in range(10)]  # repeated often
    return Penalised(
        rng.choice([1.0, 1.1, 1 / 3, 10.0]), rng.uniform(-2, 2), rng.choice([0.0, rng.uniform(-2, 2)]),
        [rng.choice(few) for _ in range(rng.randrange(1, 30))], [rng.choice(few) for _ in range(rng.randrange(30))],
    )  # fmt: skip


def fill(settings: np.void, sequence: Penalised, row: int) -> None:
    settings["table"] = 1 + row
    settings["repetition"], settings["frequency"] = sequence.repetition, sequence.frequency
    settings["presence"] = sequence.presence


@pytest.mark.parametrize("vocabulary", [31, 2077])
def test_penalties_are_the_engines_to_the_bit_step_after_step(on: Device, vocabulary: int, rng: random.Random) -> None:
    """Three sequences, and one without penalties; their last tokens are always in flight, and now and then a row of
    the table is rebuilt."""
    sequences = [penalised(rng, vocabulary) for _ in range(3)]
    kernels = on.kernels(4, vocabulary, sequences=5)
    place = [4, 0, 2]  # rows of the table
    flying = [-1] * 3  # the row of the results that holds a sequence's last token, until the host would know it
    for step in range(8):
        order = rng.sample(range(4), 4)  # row of the logits → sequence; 3 is the one without penalties
        logits = torch.randn(4, vocabulary) * 4
        rows = packed([(rng.choice([0.0, 1.0]), 0, 0.9, 0.0, rng.random()) for _ in order])
        tail: list[int] = [17]
        expected = logits.clone()
        for row, index in enumerate(order):
            if index == 3:
                continue
            sequence = sequences[index]
            if step == 0 or rng.random() < 0.2:
                kernels.count(place[index], ints(on, sequence.tokens), len(sequence.prompt))
                sequence.counted = len(sequence.tokens)
            fresh = sequence.tokens[sequence.counted :]
            rows[row]["tail"], rows[row]["seen"], rows[row]["commits"] = len(tail), len(fresh), len(fresh)
            tail += [-1 - flying[index]] if fresh else []
            assert len(fresh) <= 1
            sequence.counted += len(fresh)
            fill(rows[row], sequence, place[index])
            expected[row] = sequence.shape(logits[row], [])
        shaped = logits.to(on.device)
        ids = kernels.sample(shaped, upload(on, rows), ints(on, tail))
        assert torch.equal(shaped.cpu(), expected)
        for row, index in enumerate(order):
            if index < 3:
                sequences[index].generated.append(int(ids[row]))
                flying[index] = row
    for sequence, row in zip(sequences, place, strict=True):
        known = sequence.tokens[: sequence.counted]
        counts = torch.bincount(torch.tensor(known[len(sequence.prompt) :]).long(), minlength=vocabulary)
        counts[torch.tensor(sequence.prompt)] |= 1 << 31
        assert torch.equal(kernels._table[row].cpu().long() & 0xFFFFFFFF, counts)
    assert not kernels._table[[1, 3]].any()


def test_rows_with_drafts_see_the_drafts_before_them(on: Device, rng: random.Random) -> None:
    vocabulary, drafts = 1100, 8
    sequence = penalised(rng, vocabulary)
    kernels = on.kernels(drafts + 1, vocabulary, sequences=2)
    kernels.count(1, ints(on, sequence.tokens), len(sequence.prompt))
    for accepted in (0, 8, 3):  # in the previous step: they and the token after them are in the tail, then the drafts
        fresh = [rng.choice([*sequence.tokens, 1099]) for _ in range(accepted + 1)]
        sequence.generated += fresh
        guesses = [rng.choice(sequence.tokens) for _ in range(drafts)]
        logits = torch.randn(drafts + 1, vocabulary)
        rows = packed([(0.0, 0, 1.0, 0.0, 0.0)] * (drafts + 1))
        for ahead in range(drafts + 1):
            fill(rows[ahead], sequence, 1)
            rows[ahead]["seen"] = len(fresh) + ahead
            rows[ahead]["commits"] = len(fresh) if ahead == 0 else 0
        expected = torch.stack([sequence.shape(logits[ahead], guesses[:ahead]) for ahead in range(drafts + 1)])
        shaped = logits.to(on.device)
        ids = kernels.sample(shaped, upload(on, rows), ints(on, fresh + guesses))
        assert torch.equal(shaped.cpu(), expected)
        assert ids.tolist() == expected.argmax(1).tolist()


def test_a_penalty_decides_the_draw(on: Device) -> None:
    kernels = on.kernels(1, 4)
    kernels.count(0, ints(on, [0, 1, 2, 2]), 2)
    wanted = {(1.0, 0.5, 0.0): [2.0, -2.0, 0.0, 0.5], (1.0, 0.0, 0.5): [2.0, -2.0, 0.5, 0.5],
              (2.0, 0.0, 0.0): [1.0, -4.0, 0.5, 0.5], (2.0, 0.5, -0.25): [1.0, -4.0, -0.25, 0.5]}  # fmt: skip
    for (repetition, frequency, presence), expected in wanted.items():
        logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]], device=on.device)
        rows = np.zeros(1, dtype=SETTINGS)
        fill(rows[0], Penalised(repetition, frequency, presence, []), 0)
        assert kernels.sample(logits, upload(on, rows)).tolist() == [0]
        assert logits.tolist() == [expected]


@pytest.mark.parametrize("vocabulary", [33, 2500])
def test_masks(on: Device, vocabulary: int, rng: random.Random) -> None:
    count = 8
    logits = torch.randn(count, vocabulary)
    words = -(-vocabulary // 32)
    masks = np.frombuffer(rng.randbytes(3 * words * 4), dtype=np.int32).reshape(3, words).copy()
    masks[:, 0] |= 1 << 5  # something is left
    rows = packed([(rng.choice([0.0, 1.0]), 0, 1.0, 0.0, rng.random()) for _ in range(count)])
    expected = logits.clone()
    for row in range(count):
        if row >= 4:
            rows[row]["mask"] = 1 + row % 3
            bits = np.unpackbits(masks[row % 3].view(np.uint8), bitorder="little")[:vocabulary]
            expected[row, torch.from_numpy(bits) == 0] = -math.inf
    shaped = logits.to(on.device)
    kernels = on.kernels(count, vocabulary)
    ids = kernels.sample(shaped, upload(on, rows), None, torch.from_numpy(masks).to(on.device))
    assert torch.equal(shaped.cpu(), expected)
    assert not kernels.results[1].any()
    assert expected[torch.arange(count), ids.cpu().long()].isfinite().all()


@pytest.mark.gpu
def test_a_step_is_captured_once_and_replayed_with_other_settings(rng: random.Random) -> None:
    on = Device(torch.device("cuda"), 64, (32002,))
    kernels = on.kernels(8, 32002, sequences=8)
    logits = torch.zeros(8, 32002, device="cuda")
    rows, tail = upload(on, np.zeros(8, dtype=SETTINGS)), ints(on, [0] * 8)
    kernels.sample(logits, rows, tail)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = kernels.sample(logits, rows, tail)
    for _ in range(3):
        fresh = torch.randn(8, 32002) * 3
        chosen = [clear_setting(rng, row, random_setting) for row in fresh]
        logits.copy_(fresh)
        rows.copy_(upload(on, packed(chosen)))
        graph.replay()
        assert ids.tolist() == oracle(fresh, chosen)
