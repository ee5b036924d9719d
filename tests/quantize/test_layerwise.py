"""Quantizing a tiny model for real: AutoAWQ's choices, a kill half-way, and what can read the files."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from starling import tokenizer_json
from starling.dense import DenseWeights, loaded_model
from starling.errors import CheckpointError, StarlingError
from starling.model import awq
from starling.model.config import ModelConfig
from starling.model.mistral import Mistral
from starling.model.ops.reference import ReferenceOps
from starling.tokenizer import Tokenizer, byte_alphabet

pytest.importorskip(
    "awq", reason="AutoAWQ is not installed; requirements-reference.txt brings it", exc_type=ImportError
)

from starling.quantize.layerwise import LayerwiseQuantizer, autoawq, quantize

TEXT = "The fox crossed the river at night, and nobody saw where it went. 12 + 30 = 42.\n" * 12
SIZES = {"group_size": 32, "samples": 10, "length": 64}  # more samples than run at once
SOURCES: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral, window passed": (MistralForCausalLM, MistralConfig, {"sliding_window": 48}),
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random four-layer model in full precision, with some inputs much larger than the others."""
    folder = tmp_path_factory.mktemp("source")
    ids = {piece: i for i, piece in enumerate(["<s>", "<|end_of_turn|>", *byte_alphabet()])}
    tokenizer_json.write(tokenizer_json.byte_level(ids, [], {"<s>": 0, "<|end_of_turn|>": 1}), folder)
    model_class, config_class, changes = SOURCES[request.param]
    config = config_class(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=264, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=None, **changes,
    )  # fmt: skip
    model = model_class(config)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data = torch.exp(torch.randn(128))
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data *= torch.exp(0.5 * torch.randn(128))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def searched(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The AWQ checkpoint and the channel scales that it was made with."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    return out, quantize(source, out, TEXT, **SIZES)


@pytest.fixture(scope="module")
def quantized(searched: tuple[Path, dict[str, torch.Tensor]]) -> Path:
    return searched[0]


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_clips_are_those_that_autoawq_chooses(group_size: int) -> None:
    ours = object.__new__(LayerwiseQuantizer)
    ours.group_size, ours.w_bit, ours.zero_point = group_size, 4, True
    weights = torch.randn(64, 256) * torch.rand(256) * 0.05
    inputs = torch.randn(2, 300, 256) * torch.exp(torch.randn(256))
    theirs = autoawq.AwqQuantizer._compute_best_clip(ours, weights, inputs.clone())
    found = ours._compute_best_clip(weights, inputs.clone())
    assert found.shape == theirs.shape
    # Two candidates may be equally good up to float32's last bit; then either is right.
    assert (found == theirs).float().mean() > 0.99


def test_a_killed_run_resumes_and_ends_the_same(source: Path, quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--group-size", "32", "--samples", "10", "--length", "64", "--calibration", str(text)]
    program = (
        "import argparse, sys; from starling.quantize.command import add_quantize_command\n"
        "parser = argparse.ArgumentParser(); add_quantize_command(parser.add_subparsers())\n"
        "args = parser.parse_args(); sys.exit(args.run(args))"
    )
    command = [sys.executable, "-c", program, "quantize", str(source), str(out), *options]
    first = tmp_path / ".out.partial" / "layer-000.safetensors"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not first.exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists() and first.exists()

    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]
    resumed, whole = load_file(out / "model.safetensors"), load_file(quantized / "model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(ids.unsqueeze(0)).logits[0].float()
    return logits


def test_the_files_load_in_the_engine_in_transformers_and_in_autoawq(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(2, 258, (40,))
    exact = logits_of(loaded_model(DenseWeights(quantized)), ids)
    assert Mistral.load(quantized, ReferenceOps()).config.group_size == 32

    # AutoAWQ refuses a CPU unless its device looks like one that Triton runs on; then its plain torch path computes.
    from awq.models import base
    from awq.models.auto import AutoAWQForCausalLM
    from awq.modules.linear import gemm

    monkeypatch.setattr(base, "get_best_device", lambda: "xpu:0")
    monkeypatch.setattr(base, "triton_available", True)
    monkeypatch.setattr(gemm, "TRITON_AVAILABLE", False)
    monkeypatch.setattr(gemm, "user_has_been_warned", True)
    wrapper = AutoAWQForCausalLM.from_quantized(
        str(quantized), fuse_layers=False, trust_remote_code=False, device_map={"": "cpu"}
    )
    theirs = logits_of(wrapper.model, ids)
    # Theirs is float16 throughout.
    assert (theirs - exact).abs().max() < 0.02 * exact.abs().max()


def test_the_search_beats_rounding_on_what_it_searched(source: Path, quantized: Path) -> None:
    """Mean squared change of the first layer's output on the calibration text, against plain rounding."""
    text = Tokenizer.from_folder(source, 264).encode(TEXT)
    ids = torch.tensor([[0, *text[:255]]])

    def first_layer(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            states: torch.Tensor = model(ids, output_hidden_states=True).hidden_states[1]
        return states

    full = loaded_model(DenseWeights(source))
    exact = first_layer(full)
    searched = (first_layer(loaded_model(DenseWeights(quantized))) - exact).square().mean()
    for name, parameter in full.named_parameters():
        if "_proj" in name:
            parameter.data = awq.quantize(parameter.data, SIZES["group_size"]).dequantize()
    assert searched < (first_layer(full) - exact).square().mean()


def test_scales_cancel(source: Path, quantized: Path) -> None:
    """The columns after a norm are multiplied by what the norm is divided by; only rounding remains as a difference."""
    before, after = DenseWeights(source), DenseWeights(quantized)
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        for norm, linears in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj",)),  # up_proj's rows are scaled too
        ):
            for linear in linears:
                old, new = (
                    weights[f"{prefix}.{linear}.weight"] * weights[f"{prefix}.{norm}.weight"]
                    for weights in (before, after)
                )
                assert (new - old).norm() < 0.2 * old.norm(), f"{prefix}.{linear}"


def test_the_returned_channel_scales_are_those_applied(
    source: Path, searched: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    out, scales = searched
    before, after = DenseWeights(source), DenseWeights(out)
    scaled = ("input_layernorm", "post_attention_layernorm", "mlp.up_proj")
    assert set(scales) == {f"model.layers.{layer}.{name}" for layer in range(4) for name in scaled}
    for name, factors in scales.items():
        if name.endswith("norm"):
            torch.testing.assert_close(
                after[f"{name}.weight"] * factors, before[f"{name}.weight"], rtol=2e-3, atol=1e-4
            )
    assert not any("channel_scales" in name for name in load_file(out / "model.safetensors"))


def test_unusable_sources_outputs_and_texts_are_refused(source: Path, quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(quantized, tmp_path / "twice", TEXT, **SIZES)
    with pytest.raises(StarlingError, match="holds something already"):
        quantize(source, quantized, TEXT, **SIZES)
    with pytest.raises(StarlingError, match="less than one block"):
        quantize(source, tmp_path / "short", "a few words", **SIZES)
    assert json.loads((quantized / "config.json").read_text())["quantization_config"]["group_size"] == 32
    assert ModelConfig.from_folder(quantized).group_size == 32
