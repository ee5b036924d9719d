"""What is kept of a quantization, and the checkpoint that it becomes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from starling.quantize.partial_folder import PartialFolder
from tests.model.tiny import write_checkpoint


def test_another_plan_begins_anew(tmp_path: Path) -> None:
    PartialFolder(tmp_path / "out", {"group_size": 64}).save_layer(0, {"x": torch.zeros(1)}, {})
    assert PartialFolder(tmp_path / "out", {"group_size": 64}).has_layer(0)
    assert not PartialFolder(tmp_path / "out", {"group_size": 32}).has_layer(0)


def test_the_folder_that_one_is_in_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source)
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    out.mkdir()
    monkeypatch.chdir(out)
    PartialFolder(Path(), {}).save_layer(0, {}, {"norm": torch.ones(1)})
    assert PartialFolder(Path(), {}).finish(source, config, tensors).keys() == {"norm"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert load_file(out / "model.safetensors").keys() == tensors.keys()
