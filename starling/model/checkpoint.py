"""AWQ safetensors, read strictly: every tensor's name, shape and dtype is checked before any of them is used."""

import json
import struct
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from starling.errors import CheckpointError
from starling.model.awq import AwqWeight
from starling.model.config import ModelConfig
from starling.model.staging import Staging

DTYPES = {"F16": torch.float16, "I32": torch.int32}
FREQUENCIES = "rotary_emb.inv_freq"  # how transformers before 4.32 ended a tensor that config.json implies


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
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An opened, checked set of safetensors files. Tensors are read when asked for: mapped, or onto a GPU."""

    config: ModelConfig
    _files: dict[str, safe_open]
    _staging: Staging | None
    _places: dict[str, Place]

    def tensor(self, name: str) -> torch.Tensor:
        if self._staging is not None:
            return self._staging.tensor(*self._places[name])
        tensor: torch.Tensor = self._files[name].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def linear(self, name: str) -> AwqWeight:
        return AwqWeight(self.tensor(f"{name}.qweight"), self.tensor(f"{name}.qzeros"), self.tensor(f"{name}.scales"))


@contextmanager
def open_checkpoint(folder: Path, config: ModelConfig, staging: Staging | None = None) -> Iterator[Checkpoint]:
    """Open every *.safetensors of `folder`. Raises CheckpointError listing all faults at once.

    Tensors are mapped; with `staging` they are read onto its device.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} holds no *.safetensors file: the weights are missing.")
    with ExitStack() as stack:
        files: dict[str, safe_open] = {}
        faults: list[str] = []
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a whole safetensors file: {error}. Fetch it again.") from error
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if name.endswith(FREQUENCIES):
                    continue
                if name in files:
                    faults.append(f"{name} is stored twice")
                files[name] = file
        expected = expected_tensors(config)
        missing = sorted(expected.keys() - files.keys())
        extra = sorted(files.keys() - expected.keys())
        faults += [f"missing: {_some(missing)}"] if missing else []
        faults += [f"not part of this architecture: {_some(extra)}"] if extra else []
        for name in expected.keys() & files.keys():
            view = files[name].get_slice(name)  # type: ignore[no-untyped-call]
            dtype, shape = expected[name]
            found = (view.get_dtype(), tuple(view.get_shape()))
            if found != (dtype, shape):
                faults.append(f"{name} is {found[0]} {list(found[1])}, config.json asks for {dtype} {list(shape)}")
        if faults:
            raise CheckpointError(f"{folder} does not fit its config.json: {'; '.join(faults[:20])}.")
        places = {name: place for path in paths for name, place in _places(path, files)} if staging else {}
        yield Checkpoint(config, files, staging, places)


def _places(path: Path, checked: Container[str]) -> Iterator[tuple[str, Place]]:
    """Of every tensor in a file whose header was checked before; `checked` are their names."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name in checked:
            offset = 8 + length + entry["data_offsets"][0]
            yield name, Place(path, offset, DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
