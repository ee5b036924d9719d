"""What several rooms' tests share."""

from pathlib import Path

import pytest

from starling import demo


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small real model's checkpoint, made once a run."""
    return demo.prepare(tmp_path_factory.mktemp("weights") / "demo")
