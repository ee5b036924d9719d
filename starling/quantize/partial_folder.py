"""A quantization's progress on disk. Killed at any moment, it resumes where it was."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from starling import tensor_file
from starling.errors import StarlingError
from starling.model.checkpoint import open_checkpoint
from starling.model.config import ModelConfig

PLAN_FILE = "plan.json"
CHANNEL_SCALES = "channel_scales."  # prefix in a layer's file: not tensors of the checkpoint
# Copied from the source if they are there.
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja", "LICENSE", "demo.json",
)  # fmt: skip


class PartialFolder:
    """`.OUT.partial` beside OUT: a file per finished layer, and the plan that they belong to.

    A folder with another plan (another source, group size, text or version) is emptied first.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any]) -> None:
        """Raises StarlingError if OUT already holds something."""
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise StarlingError(f"{out} holds something already. Name another folder, or remove it.")
        self._out = out = out.resolve()  # "." has no name, and cannot be removed
        self.path = out.parent / f".{out.name}.partial"
        text = json.dumps(plan, sort_keys=True)
        plan_file = self.path / PLAN_FILE
        if not plan_file.exists() or plan_file.read_text(encoding="utf-8") != text:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            plan_file.write_text(text, encoding="utf-8")

    def has_layer(self, index: int) -> bool:
        return self._layer_file(index).exists()

    def save_layer(self, index: int, tensors: dict[str, torch.Tensor], channel_scales: dict[str, torch.Tensor]) -> None:
        """`channel_scales` are not part of the checkpoint; `finish` returns them."""
        scales = {CHANNEL_SCALES + name: found for name, found in channel_scales.items()}
        tensor_file.write(tensors | scales, self._layer_file(index))

    def finish(self, source: Path, config: dict[str, Any], others: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Write the checkpoint (all layers and `others`), check it with the engine's own reader, and rename it to OUT.

        Returns the channel scales of all layers.
        """
        tensors = dict(others)
        for path in sorted(self.path.glob("layer-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    tensors[name] = file.get_tensor(name)
        found = {name: tensors.pop(name) for name in list(tensors) if name.startswith(CHANNEL_SCALES)}
        folder = self.path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tensor_file.write(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in COMPANIONS:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        open_checkpoint(folder, ModelConfig.from_folder(folder))
        if self._out.exists():
            self._out.rmdir()  # empty, or it would have been refused
        folder.rename(self._out)
        shutil.rmtree(self.path)
        return {name.removeprefix(CHANNEL_SCALES): scales for name, scales in found.items()}

    def _layer_file(self, index: int) -> Path:
        return self.path / f"layer-{index:03}.safetensors"


def fingerprint(source: Path) -> str:
    """A digest of a checkpoint's config and its files' names, sizes and times: enough to detect a change."""
    digest = hashlib.sha256((source / "config.json").read_bytes())
    for path in sorted(source.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()
