"""What several rooms' tests share."""

from pathlib import Path

import pytest
from hypothesis import settings

from starling import demo

# A slow machine is no fault of the code.
settings.register_profile("starling", deadline=None, print_blob=True)
settings.load_profile("starling")


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real model's checkpoint, made once a run."""
    return demo.prepare(tmp_path_factory.mktemp("weights") / "demo")
