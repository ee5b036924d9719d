"""Errors about a machine's GPU state the value, the rule and the remedy."""

import pytest
import torch

from starling.errors import DeviceError
from starling.model.memory import GPU_RESERVE_BYTES, check_fits
from starling.model.ops.cuda.device import check_capability, usable_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(DeviceError, match=r"built without CUDA|No NVIDIA GPU can be used.*STARLING_DEVICE=cpu"):
        usable_gpu()


@pytest.mark.gpu
def test_with_one() -> None:
    assert usable_gpu().type == "cuda"


def test_a_gpu_that_is_too_old() -> None:
    with pytest.raises(DeviceError, match=r"Tesla T4 of compute capability 7\.5; the kernels need 8\.0"):
        check_capability("Tesla T4", (7, 5))
    for name, capability in (("NVIDIA A100", (8, 0)), ("NVIDIA A40", (8, 6)), ("NVIDIA B200", (10, 0))):
        check_capability(name, capability)


def test_too_little_memory() -> None:
    check_fits(6 * 10**9, 4 * 10**9, 6 * 10**9 - 4 * 10**9 - GPU_RESERVE_BYTES)
    with pytest.raises(DeviceError, match=r"5\.00 GB free.*weights take 4\.15 GB.*cache 0\.54 GB.*5\.76 GB in all"):
        check_fits(5 * 10**9, 4_150_000_000, 540_000_000)
