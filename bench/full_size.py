"""A checkpoint of Starling-LM-7B-alpha-AWQ's exact names, shapes and dtypes, with random values, for benchmarks.

Speed and memory do not depend on the values; nothing has to be downloaded. 4.15 GB, made once.

    python -m bench.full_size build/full-size
"""

import argparse
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from starling.model.checkpoint import expected_tensors
from starling.model.config import ModelConfig

DEFAULT = Path("build/full-size")
CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32002,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "torch_dtype": "float16",
    "quantization_config": {
        "quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True, "group_size": 128,
    },
}  # fmt: skip
ITEM_BYTES = {"I32": 4, "F16": 2}


def make(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint to `folder` unless it is there already; returns `folder`. Needs 4.2 GB of disk."""
    path = folder / "model.safetensors"
    if path.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    needed = 4_200_000_000
    if shutil.disk_usage(folder).free < needed:
        raise SystemExit(f"{folder} has less than the {needed / 1e9:.1f} GB free that the checkpoint needs.")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    tensors = expected_tensors(ModelConfig.from_dict(CONFIG))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = torch.Generator().manual_seed(seed)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (_, shape) in tensors.items():
            file.write(_values(name, shape, generator).numpy().tobytes())
    unfinished.replace(path)
    return folder


def _values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    def words() -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)

    def normal(mean: float, deviation: float) -> Callable[[], torch.Tensor]:
        return lambda: (mean + deviation * torch.randn(shape, generator=generator)).to(torch.float16)

    makers: dict[str, Callable[[], torch.Tensor]] = {
        "qweight": words,
        # Zero points of 7 and 8, as real ones mostly are; scales that keep activations near 1.
        "qzeros": lambda: (words() & 0x11111111) + 0x77777777,
        "scales": lambda: (torch.rand(shape, generator=generator) * 0.002 + 0.002).to(torch.float16),
        "embed": normal(0, 0.02),
        "lm_head": normal(0, 0.02),
        "norm": normal(1, 0.05),
    }
    return next(maker for key, maker in makers.items() if key in name)()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT)
    print(make(parser.parse_args().folder))
