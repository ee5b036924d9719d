"""The tree of errors. A message says the value, the rule and the remedy; it never quotes a prompt."""

# What mends an ImportError of what serves nobody: the reference engine, quantizing, perplexity.
INSTALL_REFERENCE = (
    "Run: .venv/bin/pip install setuptools && .venv/bin/pip install --no-build-isolation -r requirements-reference.txt"
)


class StarlingError(Exception):
    """Anything this package raises on purpose."""


class NotInstalledError(StarlingError):
    """Packages are missing that only requirements-reference.txt brings. `before` opens the message."""

    def __init__(self, error: ImportError, before: str = "") -> None:
        super().__init__(error, before)  # as they came: unpickled, an exception is made again from these

    def __str__(self) -> str:
        error, before = self.args
        return f"{before}{error.name} is not installed. {INSTALL_REFERENCE}"


class RequestError(StarlingError, ValueError):
    """What a caller asked for cannot be done: bad input, a prompt that leaves no room."""


class NoRoomError(RequestError):
    """Prompt and answer together are longer than the context or the KV cache. A chat's front knows it by this name."""


class CheckpointError(StarlingError):
    """A checkpoint's files are missing, damaged, or of a kind that is not implemented."""


class WeightsError(StarlingError):
    """Weights could not be found, fetched or verified."""


class DeviceError(StarlingError):
    """The device is missing, too small, too old, or lost."""


class EngineError(StarlingError):
    """The engine could not finish a request for a reason that is not the caller's."""


class EngineStoppedError(EngineError):
    """The engine is shut down, dead or hung, and takes no more requests."""


class GenerationCancelled(StarlingError):  # noqa: N818 - an outcome that was asked for, not a fault
    """The generation was cancelled while somebody waited for its text."""


def unforeseen(error: Exception) -> EngineError:
    """What a caller is told of an error that nobody raised on purpose: its kind, since its text may quote a prompt."""
    return EngineError(f"The server failed on this request ({type(error).__name__}). Its log has the traceback")
