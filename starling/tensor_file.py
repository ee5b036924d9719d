"""A new safetensors file: complete or absent, and readable by whoever serves it."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

METADATA = {"format": "pt"}  # transformers requires it in every file


def write(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] = METADATA) -> None:
    """Written under another name and renamed, so that a file with the right name is complete. Raises OSError."""
    unfinished = path.with_suffix(".unfinished")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata=dict(metadata))
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path} cannot be written: {error}") from error
    with suppress(PermissionError):  # on mounts that fix permissions (exFAT, network shares)
        unfinished.chmod(0o644)  # save_file leaves it readable by its owner only
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)
