"""The model's matrix products alone: ours against the floor, and against other libraries' on the same weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from bench.gpu.card import Ceilings, l2_bytes
from bench.gpu.clock import Clock, captured
from starling.model.awq import AwqWeight
from starling.model.ops import Ops

Result = TypeVar("Result")
Multiply = Callable[[torch.Tensor], torch.Tensor]  # fp16 [M, K] → [M, N]
GROUP = 128
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 512)
MIN_COPIES = 2
BEYOND_L2 = 4  # weights take turns, together this many times the size of the L2 cache
MAX_FAULT_CHARS = 60
MAX_RELATIVE_ERROR = 2e-2  # against float32: bf16 and differently rounded scales pass, a wrong layout does not


@dataclass(frozen=True)
class Shape:
    name: str
    rows: int  # N: output features
    columns: int  # K: input features
    dense: bool = False  # fp16, like the output projection

    @property
    def weight_bytes(self) -> float:
        """At least: 4 bits per weight, and per group an fp16 scale and a 4-bit zero point."""
        return self.rows * self.columns * (2 if self.dense else 0.5 + 2.5 / GROUP)

    def floor_s(self, tokens: int, ceilings: Ceilings) -> float:
        """The longer of moving the bytes and doing the arithmetic."""
        moved = self.weight_bytes + 2 * tokens * (self.rows * (2 if self.dense else 1) + self.columns)
        return max(moved / ceilings.bandwidth, 2 * tokens * self.rows * self.columns / ceilings.tensor)


SHAPES = (
    Shape("q|k|v", 6144, 4096),
    Shape("out", 4096, 4096),
    Shape("gate|up", 28672, 4096),
    Shape("down", 4096, 14336),
    Shape("head", 32002, 4096, dense=True),
)


@dataclass(frozen=True)
class Contender:
    """One way to multiply. A maker is None where it does not support such weights."""

    name: str
    make: Callable[[AwqWeight], Multiply] | None
    make_dense: Callable[[torch.Tensor], Multiply] | None = None  # of fp16 [N, K]
    dtype: torch.dtype = torch.float16  # of activations


def ours(ops: Ops) -> Contender:
    nothing = torch.zeros(0, dtype=torch.bool, device=ops.device)

    def linear(weight: AwqWeight) -> Multiply:
        packed = ops.pack_awq(weight)
        return lambda x: ops.awq_linear(x, packed, nothing)

    def head(matrix: torch.Tensor) -> Multiply:
        packed = ops.pack_head(matrix)
        return lambda x: ops.head(x, packed)

    return Contender("ours", linear, head)


def measured(
    shape: Shape, contenders: Sequence[Contender], tokens: Sequence[int], clock: Clock
) -> Iterator[tuple[int, list[float | str]]]:
    """For each M of `tokens`, the contenders' seconds in their order, measured in turn; in place of one, what failed.

    Before it is timed, each contender's result is compared with float32's.
    """
    device = clock.device
    count = cold_copies(shape, device)
    x = torch.randn(max(tokens), shape.columns, dtype=torch.float16, device=device)
    weights = [random_weight(shape, device) for _ in range(count)]
    first = weights[0]
    expected = x.float() @ (first.float() if isinstance(first, torch.Tensor) else first.dequantize()).T
    made = [attempt(partial(_make_all, contender, weights)) for contender in contenders]
    del weights, first
    for m in tokens:
        works: list[Callable[[], object] | str] = []
        for contender, multiplies in zip(contenders, made, strict=True):
            if isinstance(multiplies, str):
                works.append(multiplies)
            else:
                works.append(attempt(partial(_ready, multiplies, x[:m].to(contender.dtype), expected[:m], device)))
        seconds = iter(clock.medians([work for work in works if not isinstance(work, str)]))
        yield m, [work if isinstance(work, str) else next(seconds) / count for work in works]


def cold_copies(shape: Shape, device: torch.device) -> int:
    """How many weights must take turns so that none is found in a cache."""
    return max(MIN_COPIES, -(-BEYOND_L2 * l2_bytes(device) // int(shape.weight_bytes)))


def random_weight(shape: Shape, device: torch.device) -> AwqWeight | torch.Tensor:
    """Like bench.full_size's: any nibbles, zero points of 7 and 8, products near 1."""
    n, k = shape.rows, shape.columns
    if shape.dense:
        return torch.randn(n, k, dtype=torch.float16, device=device).mul_(k**-0.5)

    def words(rows: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (rows, n // 8), dtype=torch.int32, device=device)

    scales = (torch.rand(k // GROUP, n, device=device) + 1) * 0.2 * k**-0.5
    return AwqWeight(words(k), (words(k // GROUP) & 0x11111111) + 0x77777777, scales.half())


def _make_all(contender: Contender, weights: Sequence[AwqWeight | torch.Tensor]) -> list[Multiply] | str:
    found = []
    for weight in weights:
        if isinstance(weight, torch.Tensor):
            if contender.make_dense is None:
                return "-"
            found.append(contender.make_dense(weight))
        else:
            if contender.make is None:
                return "-"
            found.append(contender.make(weight))
    return found


def _ready(
    multiplies: Sequence[Multiply], x: torch.Tensor, expected: torch.Tensor, device: torch.device
) -> Callable[[], object]:
    error = float((multiplies[0](x).float() - expected).norm() / expected.norm())
    if not error < MAX_RELATIVE_ERROR:
        raise ArithmeticError(f"wrong by {error:.1e}")
    return captured([partial(multiply, x) for multiply in multiplies], device)


def attempt(work: Callable[[], Result]) -> Result | str:
    """The result of `work`, or its error in a few words: other libraries' code may raise anything."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:MAX_FAULT_CHARS]
