"""Which of torch's errors mean that the device is lost."""

import pytest
import torch

from starling.engine.runner import device_faults
from starling.errors import DeviceError


def fault(code: int) -> torch.AcceleratorError:
    """As torch raises it for one of CUDA's errors."""
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code  # type: ignore[attr-defined]
    return error


def test_a_lost_device_is_distinguished_from_a_full_one() -> None:
    with pytest.raises(DeviceError, match="lost"), device_faults():
        raise fault(700)  # cudaErrorIllegalAddress
    with pytest.raises(torch.AcceleratorError), device_faults():
        raise fault(2)  # cudaErrorMemoryAllocation
    with pytest.raises(torch.OutOfMemoryError), device_faults():
        raise torch.OutOfMemoryError("CUDA out of memory.")
