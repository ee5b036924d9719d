"""The exception hierarchy. A message gives the value, the rule and the remedy; it never quotes a prompt."""

import sys
from pathlib import Path

PYTHON = ".venv/bin/python" if Path(sys.prefix).name == ".venv" else "python"  # in a checkout, and in an image
# The remedy for packages missing outside of serving: for the reference engine, quantizing and perplexity.
INSTALL_REFERENCE = (
    f"Run: {PYTHON} -m pip install setuptools && "
    f"{PYTHON} -m pip install --no-build-isolation -r requirements-reference.txt"
)


class StarlingError(Exception):
    """Anything this package raises on purpose."""


class NotInstalledError(StarlingError):
    """A package is missing that only requirements-reference.txt installs. The message begins with `before`."""

    def __init__(self, error: ImportError, before: str = "") -> None:
        super().__init__(error, before)  # unformatted, because unpickling rebuilds the exception from its args

    def __str__(self) -> str:
        error, before = self.args
        return f"{before}{error.name} is not installed. {INSTALL_REFERENCE}"


class RequestError(StarlingError, ValueError):
    """The request cannot be served as it stands: bad input, or a prompt that leaves no room for an answer."""


class NoRoomError(RequestError):
    """Prompt and answer together exceed the context or the KV cache. The terminal recognises it by this name."""


class CheckpointError(StarlingError):
    """A checkpoint's files are missing, damaged or not of a supported kind."""


class WeightsError(StarlingError):
    """Weights could not be found, fetched or verified."""


class DeviceError(StarlingError):
    """The device is missing, too small, too old, or lost."""


class EngineError(StarlingError):
    """The engine could not finish a request, through no fault of the caller."""


class EngineStoppedError(EngineError):
    """The engine is shut down, dead or hung, and accepts no more requests."""


class GenerationCancelled(StarlingError):  # noqa: N818 - an outcome that was asked for, not an error
    """The generation was cancelled while its text was being read."""


def unexpected(error: Exception) -> EngineError:
    """What a caller is told about an unexpected error: only its type, since its text may quote a prompt."""
    return EngineError(f"The server failed on this request ({type(error).__name__}). Its log has the traceback")
