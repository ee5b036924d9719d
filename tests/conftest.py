"""What several rooms' tests share."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from starling import demo

# A slow machine is no fault of the code.
settings.register_profile("starling", deadline=None, print_blob=True)
settings.load_profile("starling")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real model's checkpoint, made once a run."""
    return demo.prepare(tmp_path_factory.mktemp("weights") / "demo")
