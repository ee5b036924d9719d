"""Which GPU can be used, or in plain words why none can."""

import torch

from starling.errors import DeviceError

OLDEST = (8, 0)  # compute capability, for asynchronous copies and the tensor cores' m16n8k16


def usable_gpu() -> torch.device:
    """The current NVIDIA GPU. Raises DeviceError saying what is missing."""
    if torch.version.cuda is None:
        raise DeviceError(
            f"This torch ({torch.__version__}) was built without CUDA. Install the one that requirements.txt names, or "
            "set STARLING_DEVICE=cpu."
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            f"No NVIDIA GPU can be used{_reason()}. Start the container with `--gpus all` on a machine whose driver "
            f"supports CUDA {torch.version.cuda}, or set STARLING_DEVICE=cpu."
        )
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    check_capability(name, torch.cuda.get_device_capability(device))
    try:
        torch.zeros(1, device=device)  # creates torch's context: fails if others fill the GPU or hold it exclusively
    except RuntimeError as error:
        raise DeviceError(
            f"The GPU, a {name}, cannot be used: {_first_line(error)}. Stop whatever else uses it (see `nvidia-smi`), "
            "or set STARLING_DEVICE=cpu."
        ) from error
    return device


def architecture(device: torch.device) -> int:
    """The compute capability of `device` as NVRTC writes it: 86 for 8.6."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def check_capability(name: str, capability: tuple[int, int]) -> None:
    """Raises DeviceError for a GPU that is too old for the kernels."""
    if capability < OLDEST:
        raise DeviceError(
            f"The GPU is a {name} of compute capability {capability[0]}.{capability[1]}; the kernels need "
            f"{OLDEST[0]}.{OLDEST[1]} or newer (A100, A40, RTX 30 and later). Set STARLING_DEVICE=cpu instead."
        )


def _reason() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f": {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
