"""Checkpoints are read strictly: every fault is named, before anything is used."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from starling.errors import CheckpointError
from starling.model.checkpoint import Read, expected_tensors, open_checkpoint
from starling.model.config import ModelConfig
from starling.model.reading import read_tensor
from starling.model.staging import Staging
from tests.model.test_config import STARLING
from tests.model.tiny import write_checkpoint

Tensors = dict[str, torch.Tensor]
NORM = "model.layers.1.input_layernorm.weight"
Q = "model.layers.0.self_attn.q_proj"
readers = pytest.mark.parametrize("read", [read_tensor, Staging(torch.device("cpu")).tensor], ids=["plain", "staged"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path)
    return tmp_path


def open_all(folder: Path) -> None:
    open_checkpoint(folder, ModelConfig.from_folder(folder)).linear(Q)


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("buffer_bytes", "part_bytes"), [(1000, 999), (1000, 250), (1 << 20, 1 << 19)])
def test_staged_tensors_are_the_stored_ones(folder: Path, device: str, buffer_bytes: int, part_bytes: int) -> None:
    staging = Staging(torch.device(device), buffer_bytes, part_bytes)
    staged = open_checkpoint(folder, ModelConfig.from_folder(folder), staging.tensor)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(staged.tensor(name).cpu(), tensor)


@readers
def test_a_read_may_return_less_than_was_asked_for(folder: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over a network."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, parts, offset: preadv(file, [parts[0][:100]], offset))
    config, wanted = ModelConfig.from_folder(folder), load_file(folder / "model.safetensors")
    assert torch.equal(open_checkpoint(folder, config, read).tensor(NORM), wanted[NORM])


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    for read in (read_tensor, *(Staging(torch.device("cpu"), part_bytes=size).tensor for size in (7, 1000))):
        with pytest.raises(OSError, match="ends at byte 100"):
            read(path, 60, torch.float16, (21,))


@readers
def test_a_tensor_that_can_no_longer_be_read_is_named(folder: Path, read: Read) -> None:
    """As on a failing disk, or when somebody rewrites the file. If it were mapped, this would kill the process."""
    checkpoint = open_checkpoint(folder, ModelConfig.from_folder(folder), read)
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=rf"{Q}\.qweight cannot be read from .*model\.safetensors"):
        checkpoint.linear(Q)


def test_a_header_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the network is gone."""
    config = ModelConfig.from_folder(folder)

    def refuse(path: Path, mode: str) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(type(folder), "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file: .*Input/output"):
        open_checkpoint(folder, config)


def test_the_real_checkpoints_tensors() -> None:
    expected = expected_tensors(ModelConfig.from_dict(STARLING))
    size = {"F16": 2, "I32": 4}
    held = sum(size[dtype] * torch.Size(shape).numel() for dtype, shape in expected.values())
    assert len(expected) == 739
    assert 4_150_913_000 - 120_000 < held < 4_150_913_000, "all but the header of the real file"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(NORM), f"missing: {NORM}"),
        (lambda t: t.update(extra=torch.zeros(1)), "not part of this architecture: extra"),
        (lambda t: t.update({NORM: t[NORM].float()}), f"{NORM} is F32"),
        (lambda t: t.update({NORM: t[NORM][:-1].clone()}), f"{NORM} is F16 [127]"),
        (lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:1].clone()}), f"{Q}.qzeros is I32 [1, 16]"),
    ],
)
def test_tensors_at_fault(folder: Path, edit: Callable[[Tensors], object], named: str) -> None:
    change(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        open_all(folder)
    assert named in str(caught.value)


def test_all_faults_at_once(folder: Path) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors[NORM]
        tensors["extra"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(3)

    change(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        open_all(folder)
    assert all(name in str(caught.value) for name in (NORM, "extra", "model.norm.weight"))


def test_what_is_missing_is_named_or_counted(folder: Path) -> None:
    """As if one of several files had not been downloaded."""
    lost = [name for name in expected_tensors(ModelConfig.from_folder(folder)) if ".layers.1." in name]

    def edit(tensors: Tensors) -> None:
        for name in lost:
            del tensors[name]

    change(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        open_all(folder)
    named = sum(name in str(caught.value) for name in lost)
    assert named > 1 and f" and {len(lost) - named} more" in str(caught.value)


def test_frequencies_that_older_checkpoints_hold_are_ignored(folder: Path) -> None:
    """transformers before 4.32 stored them; they follow from config.json."""
    change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    open_all(folder)


def test_a_tensor_stored_twice(folder: Path) -> None:
    save_file({NORM: torch.zeros(128, dtype=torch.float16)}, folder / "second.safetensors")
    with pytest.raises(CheckpointError, match="stored twice"):
        open_all(folder)


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_a_file_cut_short(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="complete safetensors file"):
        open_all(folder)


def test_no_file_and_pickles_do_not_count(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights are missing"):
        open_all(folder)


def test_several_files_are_one_checkpoint(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    first = dict(list(tensors.items())[::2])
    save_file(first, folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name not in first}, folder / "more.safetensors")
    checkpoint = open_checkpoint(folder, ModelConfig.from_folder(folder))
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())
