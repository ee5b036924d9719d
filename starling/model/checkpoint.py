"""AWQ safetensors, read strictly: every tensor's name, shape and dtype is checked before any of them is used."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from starling.errors import CheckpointError
from starling.model.awq import AwqWeight
from starling.model.config import ModelConfig
from starling.model.reading import read_tensor

DTYPES = {"F16": torch.float16, "I32": torch.int32}
HEADER_BYTES = 1 << 20  # larger than any header: Starling's is 0.1 MB
INV_FREQ_SUFFIX = "rotary_emb.inv_freq"  # of tensors that transformers before 4.32 stored; config.json implies them


def expected_tensors(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name → (safetensors dtype, shape) of every tensor that a checkpoint of this shape holds."""
    hidden, inter, group = config.hidden_size, config.intermediate_size, config.group_size
    linears = {
        "self_attn.q_proj": (hidden, config.q_size),
        "self_attn.k_proj": (hidden, config.kv_size),
        "self_attn.v_proj": (hidden, config.kv_size),
        "self_attn.o_proj": (config.q_size, hidden),
        "mlp.gate_proj": (hidden, inter),
        "mlp.up_proj": (hidden, inter),
        "mlp.down_proj": (inter, hidden),
    }
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("F16", (config.vocab_size, hidden))
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, (fan_in, fan_out) in linears.items():
            tensors[f"{prefix}.{name}.qweight"] = ("I32", (fan_in, fan_out // 8))
            tensors[f"{prefix}.{name}.qzeros"] = ("I32", (fan_in // group, fan_out // 8))
            tensors[f"{prefix}.{name}.scales"] = ("F16", (fan_in // group, fan_out))
        tensors[f"{prefix}.input_layernorm.weight"] = ("F16", (hidden,))
        tensors[f"{prefix}.post_attention_layernorm.weight"] = ("F16", (hidden,))
    tensors["model.norm.weight"] = ("F16", (hidden,))
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = ("F16", (config.vocab_size, hidden))
    return tensors


class Place(NamedTuple):
    """Where a tensor's bytes are."""

    path: Path
    offset: int
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]


# Reads a tensor, given its path, offset, dtype and shape; raises OSError.
Read = Callable[[Path, int, torch.dtype, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checked set of safetensors files. Tensors are read when asked for: into memory, or onto a GPU."""

    config: ModelConfig
    _places: dict[str, Place]
    _read: Read

    def tensor(self, name: str) -> torch.Tensor:
        """Raises CheckpointError if its bytes cannot be read, as on a failing disk."""
        path, offset, dtype, shape = self._places[name]
        try:
            return self._read(path, offset, DTYPES[dtype], shape)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read from {path}: {error}. Fetch it again.") from error

    def linear(self, name: str) -> AwqWeight:
        return AwqWeight(self.tensor(f"{name}.qweight"), self.tensor(f"{name}.qzeros"), self.tensor(f"{name}.scales"))


def open_checkpoint(folder: Path, config: ModelConfig, read: Read = read_tensor) -> Checkpoint:
    """Check every *.safetensors of `folder`. Raises CheckpointError listing all faults at once.

    `read` loads a tensor into memory, or with `Staging.tensor` onto its device.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} holds no *.safetensors file: the weights are missing.")
    stored: dict[str, Place] = {}
    faults: list[str] = []
    for path in paths:
        places = _places(path)
        faults += [f"{name} is stored twice" for name in places if name in stored]
        stored |= places
    expected = expected_tensors(config)
    missing = sorted(expected.keys() - stored.keys())
    extra = sorted(stored.keys() - expected.keys())
    faults += [f"missing: {_some(missing)}"] if missing else []
    faults += [f"not part of this architecture: {_some(extra)}"] if extra else []
    for name in expected.keys() & stored.keys():
        (dtype, shape), found = expected[name], stored[name]
        if (found.dtype, found.shape) != (dtype, shape):
            faults.append(f"{name} is {found.dtype} {list(found.shape)}, config.json asks for {dtype} {list(shape)}")
    if faults:
        raise CheckpointError(f"{folder} does not fit its config.json: {'; '.join(faults[:20])}.")
    return Checkpoint(config, stored, read)


def _places(path: Path) -> dict[str, Place]:
    """Where each tensor of a file lies, but for those config.json implies. Raises CheckpointError if it is damaged."""
    try:
        with path.open("rb") as file:
            file.read(HEADER_BYTES)  # a read error raises here; in safe_open, which maps the file, it would be a SIGBUS
            with safe_open(path, framework="pt"):
                pass  # opening checks the header against the file's length, and the tensors against each other
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}. Fetch it again.") from error
    return {
        name: Place(path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__" and not name.endswith(INV_FREQ_SUFFIX)
    }


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
