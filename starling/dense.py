"""Checkpoints as unquantized matrices, and transformers' own Mistral and Llama on top of them.

Both kinds of folder read alike: full precision (Hugging Face safetensors, one file or many) and AWQ, whose 4-bit
linears are dequantized on access. Everything built on this is a second opinion: it shares the reading of files with
the serving path, but no arithmetic except `AwqWeight.dequantize`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import cpu_offload, init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from starling.errors import CheckpointError
from starling.model.awq import AwqWeight
from starling.model.checkpoint import INV_FREQ_SUFFIX
from starling.model.config import ARCHITECTURES, read_config

_AWQ_PARTS = (".qweight", ".qzeros", ".scales")


class DenseWeights(Mapping[str, torch.Tensor]):
    """Every weight of a checkpoint by its Hugging Face name, as `dtype`; read and dequantized on every access."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Raises CheckpointError if `folder` is not a Mistral or Llama checkpoint."""
        self.folder = folder
        self.dtype = dtype
        self.raw_config = read_config(folder)
        self.quantized = "quantization_config" in self.raw_config
        self.architecture, self.config = _model_config(folder, self.raw_config)
        self._files = _open_all(folder)
        self._names = sorted({_dense_name(name) for name in self._files if not name.endswith(INV_FREQ_SUFFIX)})
        if self.config.tie_word_embeddings and "lm_head.weight" not in self._names:
            self._names.append("lm_head.weight")

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._files:
            return self._read(name).to(self.dtype)
        stem = name.removesuffix(".weight")
        if f"{stem}.qweight" in self._files:
            return AwqWeight(*(self._read(stem + part) for part in _AWQ_PARTS)).dequantize(self.dtype)
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            return self["model.embed_tokens.weight"]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> list[int]:
        """The shape of the weight `name`, without reading it."""
        stem = name.removesuffix(".weight")
        if f"{stem}.qweight" in self._files:
            return [self._stored_shape(f"{stem}.scales")[1], self._stored_shape(f"{stem}.qweight")[0]]
        return self._stored_shape(name if name in self._files else "model.embed_tokens.weight")

    def _stored_shape(self, name: str) -> list[int]:
        shape: list[int] = self._files[name].get_slice(name).get_shape()
        return shape

    def _read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def empty_model(weights: DenseWeights) -> PreTrainedModel:
    """transformers' model for these weights, its parameters on `meta`. Raises CheckpointError listing what differs."""
    with init_empty_weights():
        model: PreTrainedModel = getattr(transformers, weights.architecture)(weights.config)
    model.tie_weights()
    model.requires_grad_(False)
    model.train(False)
    # Defaults, whatever the files beside the weights say.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{weights.folder} does not fit its config.json: missing {missing[:8]}, unexpected {extra[:8]}."
        )
    for name, shape in expected.items():
        if (found := weights.shape(name)) != shape:
            raise CheckpointError(
                f"{weights.folder} does not fit its config.json: as a matrix, {name} is {found}, expected {shape}."
            )
    return model


def load_module(model: PreTrainedModel, prefix: str, weights: DenseWeights, device: str | torch.device = "cpu") -> None:
    """Load the weights of all parameters of `model` whose names start with `prefix`, onto `device`."""
    for name, _ in list(model.named_parameters()):
        if name.startswith(prefix):
            set_module_tensor_to_device(model, name, device, value=weights[name], dtype=weights.dtype)


def loaded_model(weights: DenseWeights, device: str | torch.device = "cpu") -> PreTrainedModel:
    """transformers' model with all its weights in memory."""
    model = empty_model(weights)
    load_module(model, "", weights, device)
    model.tie_weights()
    return model


def streamed_model(weights: DenseWeights, device: str | torch.device = "cpu") -> PreTrainedModel:
    """transformers' model whose weights are read as the forward pass reaches them, and dropped afterwards.

    Memory holds one matrix at a time: a 7B model runs in a few GB, at the cost of reading its files once per pass.
    """
    model = empty_model(weights)
    # accelerate re-ties weights that transformers tied; weights that come and go cannot be tied.
    if weights.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight), requires_grad=False)
    streamed: PreTrainedModel = cpu_offload(model, torch.device(device), state_dict=weights)
    return streamed


def _dense_name(name: str) -> str:
    for part in _AWQ_PARTS:
        if name.endswith(part):
            return name.removesuffix(part) + ".weight"
    return name


def _model_config(folder: Path, raw: dict[str, Any]) -> tuple[str, PretrainedConfig]:
    architectures = raw.get("architectures") or [None]
    if architectures[0] not in ARCHITECTURES:
        raise CheckpointError(f"{folder} has architectures {architectures!r}; implemented: {', '.join(ARCHITECTURES)}.")
    config: PretrainedConfig = getattr(transformers, architectures[0]).config_class.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if architectures[0] == "LlamaForCausalLM" and getattr(config, "sliding_window", None) is not None:
        del config.sliding_window  # Llama's attention ignores it, but generate's cache would drop all before it
    return architectures[0], config


def _open_all(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a complete safetensors file: {error}. Fetch it again.") from error
        files |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]
    if not files:
        raise CheckpointError(
            f"{folder} holds no *.safetensors file. A checkpoint in another format must be converted first."
        )
    return files
