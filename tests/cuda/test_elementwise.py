"""The small operations against the plain-torch oracle: emulated, and on a GPU."""

import random

import pytest
import torch

from starling.model.ops.cuda.driver import DriverModule
from starling.model.ops.cuda.elementwise import ElementwiseKernels
from starling.model.ops.reference import ReferenceOps
from tests.cuda.emulator import EmulatedModule

REFERENCE = ReferenceOps()


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.gpu,
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown when the test fails
    torch.manual_seed(seed)
    return str(request.param)


def kernels(device: str) -> ElementwiseKernels:
    return ElementwiseKernels(
        EmulatedModule if device == "cpu" else lambda source: DriverModule.on_gpu(source, torch.device(device))
    )


@pytest.mark.parametrize(("tokens", "width"), [(0, 8), (1, 14336), (5, 1536), (3, 8), (33, 40)])
def test_silu_and_mul(device: str, tokens: int, width: int) -> None:
    gate_up = (torch.randn(tokens, 2 * width, device=device) * 20).half()
    found = kernels(device).silu_and_mul(gate_up)
    assert found.dtype == torch.float16
    # One rounding to fp16 (2^-11, or half its smallest subnormal), and an exponential good to 2^-20 here.
    torch.testing.assert_close(found.float(), REFERENCE.silu_and_mul(gate_up.float()), rtol=2**-11 * 1.01, atol=2**-24)


@pytest.mark.parametrize("hidden", [4096, 576, 40, 4])
def test_embedding(device: str, hidden: int) -> None:
    table = torch.randn(100, hidden, device=device).half()
    ids = torch.randint(0, 100, (7,), dtype=torch.int32, device=device)
    sampled = torch.randint(0, 100, (3,), dtype=torch.int32, device=device)
    ids[[1, 4]] = torch.tensor([-3, -1], dtype=torch.int32, device=device)  # rows 2 and 0 of what was sampled
    found = kernels(device).embed(ids, sampled, table)
    assert torch.equal(found, REFERENCE.embed(ids, table, sampled))


@pytest.mark.parametrize(("width", "hidden"), [(4096, 4096), (48, 40), (8, 4)])
def test_picked_rows(device: str, width: int, hidden: int) -> None:
    attended, residual = torch.randn(9, width, device=device).half(), torch.randn(9, hidden, device=device)
    for rows in ([], [8], [0, 3, 4, 8]):
        index = torch.tensor(rows, dtype=torch.int32, device=device)
        picked, kept = kernels(device).pick(index, attended, residual)
        assert torch.equal(picked, attended[rows]) and torch.equal(kept, residual[rows])
