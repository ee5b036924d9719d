"""The errors' messages, in other processes too."""

import pickle
import sys
from pathlib import Path

import pytest

from starling.errors import INSTALL_REFERENCE, NotInstalledError, StarlingError
from starling.service import load_engine
from starling.settings import Settings


def test_a_missing_package_is_named_across_processes_too() -> None:
    """A replica sends its errors pickled."""
    error = NotInstalledError(ModuleNotFoundError("No module named 'awq'", name="awq"), before="AutoAWQ's ")
    for found in (error, pickle.loads(pickle.dumps(error))):
        assert str(found) == f"AutoAWQ's awq is not installed. {INSTALL_REFERENCE}"


def test_the_reference_engine_without_transformers_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starling.reference", None)  # type: ignore[arg-type]
    with pytest.raises(StarlingError, match=r"^STARLING_ENGINE is reference, and .* is not installed\. Run: "):
        load_engine(tmp_path, Settings(engine="reference"))
