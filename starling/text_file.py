"""A user's text, read from a UTF-8 file."""

from pathlib import Path

from starling.errors import StarlingError


def read(path: Path) -> str:
    """Raises StarlingError when it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StarlingError(f"{path} cannot be read: {error}.") from error
