"""A CUDA runtime without a GPU, for torch's CUDA build; see __main__.py."""

import torch


def is_emulated() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_name() == "Emulated GPU"
