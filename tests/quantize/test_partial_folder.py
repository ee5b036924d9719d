"""A quantization's progress on disk, and the checkpoint that it becomes."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from starling.errors import CheckpointError, StarlingError
from starling.quantize.partial_folder import PartialFolder, fingerprint
from tests.model.tiny import write_checkpoint


def test_another_plan_starts_afresh(tmp_path: Path) -> None:
    PartialFolder(tmp_path / "out", {"group_size": 64}).save_layer(0, {"x": torch.zeros(1)}, {})
    assert PartialFolder(tmp_path / "out", {"group_size": 64}).has_layer(0)
    assert not PartialFolder(tmp_path / "out", {"group_size": 32}).has_layer(0)


def test_a_half_written_layer_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("starling.tensor_file.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        PartialFolder(tmp_path / "out", {}).save_layer(0, {}, {})
    assert not PartialFolder(tmp_path / "out", {}).has_layer(0)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(StarlingError, match="holds something already"):
            PartialFolder(out, {})


def test_a_changed_source_has_another_fingerprint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    found = [fingerprint(tmp_path), fingerprint(tmp_path)]
    assert found[0] == found[1]
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    found.append(fingerprint(tmp_path))
    weights.write_bytes(weights.read_bytes()[:-1])
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    found.append(fingerprint(tmp_path))
    config.write_text(config.read_text().replace("300", "301"))
    found.append(fingerprint(tmp_path))
    weights.rename(weights.with_name("another.safetensors"))
    found.append(fingerprint(tmp_path))
    assert len(set(found)) == len(found) - 1


def test_the_checkpoint_is_complete_and_synced_to_disk(tmp_path: Path, disk_events: list[tuple[object, ...]]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source)
    (source / "tokenizer.json").write_text("{}")
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    partial = PartialFolder(out, {})
    lost = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(CheckpointError, match="missing"):
        partial.finish(source, config, lost)
    assert not out.exists()
    PartialFolder(out, {}).finish(source, config, tensors)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in out.iterdir()), "another user may serve it"
    inode = (out / "model.safetensors").stat().st_ino
    named = disk_events.index(("renamed", inode, "model.safetensors"))
    assert ("synced", inode) in disk_events[:named]


def test_out_may_be_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_checkpoint(source)
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    out.mkdir()
    monkeypatch.chdir(out)
    PartialFolder(Path(), {}).save_layer(0, {}, {"norm": torch.ones(1)})
    assert PartialFolder(Path(), {}).finish(source, config, tensors).keys() == {"norm"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert load_file(out / "model.safetensors").keys() == tensors.keys()
