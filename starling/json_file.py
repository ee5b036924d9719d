"""One of a checkpoint's JSON files, parsed."""

import json
from pathlib import Path
from typing import Any

from starling.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises CheckpointError when it is missing, damaged or not an object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: a checkpoint folder needs {path.name}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Fetch it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not an object. Fetch it again.")
    return raw
