"""A tiny random model: its checkpoint as Starling reads it, and the same matrices in transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from starling.model.awq import AwqWeight, quantize
from starling.model.checkpoint import expected_tensors
from starling.model.config import ModelConfig

CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 331,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 300,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "quantization_config": {
        "quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True, "group_size": 64,
    },
}  # fmt: skip


def write_checkpoint(folder: Path, **changes: Any) -> ModelConfig:
    """Random weights in AWQ, about as large as a trained model's. `changes` apply to config.json."""
    raw = {**CONFIG, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_dict(raw)
    tensors: dict[str, torch.Tensor] = {}
    for name, (_, shape) in expected_tensors(config).items():
        if name.endswith(".qweight"):
            inputs, outputs = shape[0], shape[1] * 8
            weight = quantize(torch.randn(outputs, inputs) / inputs**0.5, config.group_size)
            stem = name.removesuffix("qweight")
            tensors |= {name: weight.qweight, f"{stem}qzeros": weight.qzeros, f"{stem}scales": weight.scales}
        elif "norm" in name:
            tensors[name] = (1 + 0.1 * torch.randn(shape)).half()
        elif name not in tensors and not name.endswith(("qzeros", "scales")):
            tensors[name] = (torch.randn(shape) * (0.7 if "embed" in name else 0.1)).half()
    save_file(tensors, folder / "model.safetensors")
    return config


def transformers_model(folder: Path) -> Any:
    """The checkpoint's matrices in transformers' own float32 model."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config")
    (architecture,) = raw.pop("architectures")
    made_of = {
        "MistralForCausalLM": (MistralConfig, MistralForCausalLM),
        "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    }
    config_class, model_class = made_of[architecture]
    stored = load_file(folder / "model.safetensors")
    state = {}
    for name, tensor in stored.items():
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            weight = AwqWeight(tensor, stored[f"{stem}.qzeros"], stored[f"{stem}.scales"])
            state[f"{stem}.weight"] = weight.dequantize()
        elif not name.endswith((".qzeros", ".scales")):
            state[name] = tensor.float()
    model = model_class(config_class(**raw, attn_implementation="eager")).float()
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()
