"""Make a few layers of a full-precision checkpoint with Starling's shapes and random values: a source to quantize.

    python -m bench.full_size_dense build/full-size-dense --layers 2
    python -m starling quantize build/full-size-dense build/full-size-awq

Memory and time per layer do not depend on the values. 0.9 GB for two layers, 14.5 GB for all 32.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.full_size import CONFIG
from starling import tokenizer_json
from starling.model.checkpoint import expected_tensors
from starling.model.config import ModelConfig


def make(folder: Path, layers: int) -> Path:
    """Write the checkpoint to `folder`, in float16, one file per layer, as on model hubs. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = CONFIG | {"num_hidden_layers": layers}
    shapes = expected_tensors(ModelConfig.from_dict(raw))
    del raw["quantization_config"]
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, (_, shape) in shapes.items():
        if name.endswith((".qzeros", ".scales")):
            continue
        if name.endswith(".qweight"):
            inputs, outputs = shape[0], shape[1] * 8
            tensor = torch.randn(outputs, inputs) / inputs**0.5
        else:
            tensor = torch.ones(shape) if "norm" in name else 0.02 * torch.randn(shape)
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(part, {})[name.replace(".qweight", ".weight")] = tensor.half()
    for part, tensors in files.items():
        save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json.starling_tokenizer()), encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.full_size_dense", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to make it")
    parser.add_argument("--layers", type=int, default=2, help="how many, of 32 (default: %(default)s)")
    options = parser.parse_args()
    print(make(options.folder, options.layers))
