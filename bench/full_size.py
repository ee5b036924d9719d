"""Make a checkpoint with Starling-LM-7B-alpha-AWQ's exact names, shapes and size, and random values, for benchmarks.

    python -m bench.full_size build/full-size

Speed and memory do not depend on the values, and nothing has to be downloaded. 4.15 GB, made once. With mistral-common
and sentencepiece installed the folder also gets the real tokenizer, and can be served like the real model's.
"""

import argparse
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from starling import tokenizer_json
from starling.errors import WeightsError
from starling.file_system import free_disk_bytes
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
SIZE = 4_150_913_000  # bytes of the real model.safetensors
ITEM_BYTES = {"I32": 4, "F16": 2}


def make(folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint to `folder`, unless it is there already, and return `folder`. Needs 4.2 GB of disk."""
    path = folder / "model.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        free = free_disk_bytes(folder)
        if free < SIZE:
            raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free, but the checkpoint needs {SIZE / 1e9:.1f} GB.")
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
        _write(path, np.random.default_rng(seed))
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        try:
            tokenizer.write_text(json.dumps(tokenizer_json.starling_tokenizer()), encoding="utf-8")
        except (WeightsError, ImportError) as error:
            print(f"No tokenizer.json, so this folder can be benchmarked but not served: {error}")
    return folder


def _write(path: Path, random: np.random.Generator) -> None:
    # As the safetensors library orders them: the widest dtype first, then by name.
    tensors = sorted(expected_tensors(ModelConfig.from_dict(CONFIG)).items(), key=lambda t: (t[1][0] != "I32", t[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors:
        size = int(np.prod(shape)) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, (_, shape) in tensors:
            _values(name, shape, random).tofile(file)
    unfinished.replace(path)


def _values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    def words() -> np.ndarray:
        return random.integers(-(2**31), 2**31, shape, dtype=np.int32)

    def normal(mean: float, deviation: float) -> Callable[[], np.ndarray]:
        def values() -> np.ndarray:  # by torch, which rounds to halves ten times as fast
            generator = torch.Generator().manual_seed(int(random.integers(2**31)))
            return torch.empty(shape).normal_(mean, deviation, generator=generator).half().numpy()

        return values

    makers: dict[str, Callable[[], np.ndarray]] = {
        "qweight": words,
        # Zero points of 7 and 8, like most real ones; scales that keep activations near 1.
        "qzeros": lambda: (words() & 0x11111111) + 0x77777777,
        "scales": lambda: (random.random(shape, dtype=np.float32) * 0.002 + 0.002).astype(np.float16),
        "embed": normal(0, 0.02),
        "lm_head": normal(0, 0.02),
        "norm": normal(1, 0.05),
    }
    return next(maker for key, maker in makers.items() if key in name)()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.full_size", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT, help="where to make it (default: %(default)s)")
    print(make(parser.parse_args().folder))
