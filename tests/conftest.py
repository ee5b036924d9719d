"""What several rooms' tests share."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from starling import demo

# Ctrl-C is tested on processes that inherit this, and what a shell starts with & ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Every server that a test asks is on this machine: a proxy that the environment names is for others.
os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")
# What the caller's own servers and downloads are set up with is not for those of the tests.
for name in [name for name in os.environ if name.startswith(("STARLING_", "HF_")) and name != "STARLING_TEST_SEED"]:
    del os.environ[name]
# A slow machine is no fault of the code.
settings.register_profile("starling", deadline=None, print_blob=True)
settings.load_profile("starling")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Asked for the GPU's tests alone, import no file that holds none: a machine with a GPU may lack what others need.

    The GPU's tests need torch, transformers, safetensors, pydantic, huggingface_hub, psutil, tqdm and hypothesis;
    neither Cog nor anything of its server, the tokenizer or the grammars.
    """
    if config.option.markexpr != "gpu":
        return None
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("mark.gpu" in file.read_text(encoding="utf-8") for file in files) else True


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        try:
            torch.cuda.synchronize()
        except torch.AcceleratorError:
            pytest.skip("the GPU was lost to this process in a test before")


@pytest.fixture
def rng() -> random.Random:
    """Fresh in every test; torch and the random module draw from the same seed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown when the test fails
    random.seed(seed)
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real model's checkpoint, made once a run: of two workers, one makes it for both."""
    folder = tmp_path_factory.mktemp("weights") / "demo"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return demo.prepare(folder)
    return shutil.copytree(demo.prepare(tmp_path_factory.getbasetemp().parent / "demo"), folder)


@pytest.fixture
def disk_events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """("synced", inode) and ("renamed", inode, new name), in order, of what this process tells the disk."""
    events: list[tuple[object, ...]] = []
    fsync = os.fsync

    def noting_sync(file: int) -> None:
        events.append(("synced", os.fstat(file).st_ino))
        fsync(file)

    def noting(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def noting_rename(old: Path, new: Path) -> None:
            events.append(("renamed", Path(old).stat().st_ino, Path(new).name))
            rename(old, new)

        return noting_rename

    monkeypatch.setattr(os, "fsync", noting_sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    return events
