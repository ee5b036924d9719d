"""The AWQ format: packing round-trips, rounding is as good as four bits allow, and words are as AutoAWQ packs them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from starling.model import awq


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_unpacking_undoes_packing(rows: int, words: int, seed: int) -> None:
    values = torch.randint(0, 16, (rows, 8 * words), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(awq.unpack(awq.pack(values)).long(), values)


def test_the_order_of_nibbles_is_autoawqs() -> None:
    # Columns 0 to 7 hold 0 to 7; AutoAWQ puts columns 0, 2, 4, 6, 1, 3, 5, 7 into nibbles 0 to 7.
    (word,) = awq.pack(torch.arange(8).unsqueeze(0)).flatten().tolist()
    assert word == 0x75316420


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rounding_errs_by_half_a_step_at_most(group_size: int) -> None:
    matrix = torch.randn(48, 256, generator=torch.Generator().manual_seed(seed := torch.seed() % 2**32))
    weight = awq.quantize(matrix, group_size)
    assert (weight.in_features, weight.out_features, weight.group_size) == (256, 48, group_size)
    steps = weight.scales.float().t().repeat_interleave(group_size, dim=1)
    # Half a step, and another half where the zero point was rounded away from an end of the range.
    assert ((weight.dequantize() - matrix).abs() <= 1.01 * steps).all(), f"seed {seed}"
    assert ((weight.dequantize() - matrix).abs() / steps).mean() < 0.3, f"seed {seed}"


@pytest.mark.parametrize(
    "matrix",
    [
        torch.rand(16, 64) + 3,
        torch.rand(16, 64) - 4,
        torch.zeros(16, 64),
        -torch.logspace(-7, -4, 4096).unsqueeze(1).expand(-1, 64),  # scales so small that float16 keeps few digits
    ],
    ids=["positive", "negative", "zero", "tiny"],
)
def test_groups_that_lie_on_one_side_of_zero_keep_their_values(matrix: torch.Tensor) -> None:
    weight = awq.quantize(matrix, 32)
    steps = weight.scales.float().t().repeat_interleave(32, dim=1)
    assert ((weight.dequantize() - matrix).abs() <= 1.01 * steps).all()


def test_layers_side_by_side() -> None:
    first, second = (awq.quantize(torch.randn(rows, 64), 32) for rows in (16, 8))
    both = awq.concatenate([first, second])
    assert torch.equal(both.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
