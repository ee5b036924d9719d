"""Fixtures and set-up that all tests share."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from starling import demo

# Ctrl-C is tested on child processes, which inherit this: a shell's background jobs (&) ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Every server that the tests call is on this machine, and a proxy set in the environment is for other machines.
os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")
# Settings for the developer's own servers and downloads must not reach those of the tests.
for name in [name for name in os.environ if name.startswith(("STARLING_", "HF_")) and name != "STARLING_TEST_SEED"]:
    del os.environ[name]
# It would hide a flush that is missing.
os.environ.pop("PYTHONUNBUFFERED", None)
# A slow machine is not the code's fault.
settings.register_profile("starling", deadline=None, print_blob=True)
settings.load_profile("starling")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, import only files with GPU tests: a GPU machine may lack packages that the other tests need.

    GPU tests need torch, transformers, safetensors, pydantic, huggingface_hub, psutil, tqdm and hypothesis. Those in
    server/ need Cog and httpx too, and are left out without.
    """
    if config.option.markexpr != "gpu":
        return None
    if "server" in collection_path.parts and not all(map(find_spec, ("cog", "httpx"))):
        return True
    files = collection_path.rglob("test_*.py") if collection_path.is_dir() else [collection_path]
    return None if any("mark.gpu" in file.read_text(encoding="utf-8") for file in files) else True


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        try:
            torch.cuda.synchronize()
        except torch.AcceleratorError:
            pytest.skip("an earlier test in this process lost the GPU")


@pytest.fixture
def rng() -> random.Random:
    """Newly seeded in every test; torch and the random module get the same seed."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown when the test fails
    random.seed(seed)
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real model's checkpoint, built once per run: one xdist worker builds it for all."""
    folder = tmp_path_factory.mktemp("weights") / "demo"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return demo.prepare(folder)
    return shutil.copytree(demo.prepare(tmp_path_factory.getbasetemp().parent / "demo"), folder)


@pytest.fixture
def disk_events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """This process's fsyncs and renames, in order: ("synced", inode) and ("renamed", inode, new name)."""
    events: list[tuple[object, ...]] = []
    fsync = os.fsync

    def recording_sync(file: int) -> None:
        events.append(("synced", os.fstat(file).st_ino))
        fsync(file)

    def recording(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def recording_rename(old: Path, new: Path) -> None:
            events.append(("renamed", Path(old).stat().st_ino, Path(new).name))
            rename(old, new)

        return recording_rename

    monkeypatch.setattr(os, "fsync", recording_sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, recording(getattr(os, name)))
    return events
