"""Where this process's weights are: an explicit folder, the folder that was baked in, or a download."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from starling.errors import PYTHON, WeightsError
from starling.settings import Settings
from starling.weights.download import pull
from starling.weights.inspection import FileReport, State, faults, inspect, verify
from starling.weights.lock import Lock
from starling.weights.source import RetryPolicy

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2] / "weights"
LOCK_PATH = ROOT / "starling-lm-7b-alpha-awq.lock"
ALTERNATIVE = (
    "name the folder of an AWQ checkpoint in STARLING_WEIGHTS. To try it without them, run scripts/demo in a checkout."
)
REMEDY = (
    f"Fetch them with `{PYTHON} -m starling weights pull`, let the start do it with STARLING_ALLOW_DOWNLOAD=1, or "
    f"{ALTERNATIVE}"
)
EXPLICIT_REMEDY = (
    "Name the folder of an AWQ checkpoint there, or unset it to serve the weights that "
    f"`{PYTHON} -m starling weights pull` fetches. To try it without them, run scripts/demo in a checkout."
)


STAND_IN_MARKER = "demo.json"  # its presence says: this is the demo's small model, not Starling


@dataclass(frozen=True)
class Located:
    """A checkpoint's folder, how it was found, and the digest of its tensors where the lock vouches for it."""

    folder: Path
    origin: Literal["explicit", "baked", "downloaded"]
    model_sha256: str | None = None

    @property
    def stand_in(self) -> bool:
        """Whether this is the demo's model; whatever serves it says so."""
        return (self.folder / STAND_IN_MARKER).exists()


def locate(
    explicit: Path | None = None,
    *,
    allow_download: bool = False,
    where: str | None = None,
    lock_path: Path = LOCK_PATH,
    folder: Path | None = None,
    retry: RetryPolicy | None = None,
) -> Located:
    """The first that applies: `explicit` (not checked against the lock), `folder` (checked), a download into it.

    `folder` defaults to the one beside the lock with the same name; `where` names a mirror, see `open_source`.
    Raises a WeightsError that says what is missing and how to get it.
    """
    if explicit is not None:
        return _explicit(explicit)
    lock = Lock.read(lock_path)
    folder = folder or lock_path.with_suffix("")
    reports = inspect(folder, lock)
    if not faults(reports):  # sizes are right: digests are worth their time
        reports = verify(folder, lock)
    if not faults(reports):
        return _located(folder, "baked", reports)
    if not allow_download:
        absent = all(report.state is State.MISSING for report in reports)
        lines = "\n  - the folder is absent or empty" if absent else "".join(f"\n  - {f}" for f in faults(reports))
        raise WeightsError(f"There are no usable weights in {folder}, and no download is allowed:{lines}\n{REMEDY}")
    logger.info("Downloading %s at %s (licence: %s)", lock.repository, lock.revision, lock.licence)
    try:
        return _located(folder, "downloaded", pull(lock, folder, where, retry))
    except WeightsError as error:
        raise WeightsError(f"{error}\nOr {ALTERNATIVE}") from error


def locate_weights(settings: Settings) -> Located:
    """`locate`, as the settings say. Raises WeightsError."""
    return locate(settings.weights, allow_download=settings.allow_download, where=settings.weights_source)


def _explicit(folder: Path) -> Located:
    try:
        if not folder.is_dir():
            raise WeightsError(f"STARLING_WEIGHTS names {str(folder)!r}, which is not a folder. {EXPLICIT_REMEDY}")
        missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
        if not any(path.suffix == ".safetensors" for path in folder.iterdir()):  # glob would silently find none
            missing.append("*.safetensors (no other format is read: pickles can run code)")
    except OSError as error:  # a folder that this user may not enter, for example
        fault = f"STARLING_WEIGHTS names {str(folder)!r}, which cannot be read: {error.strerror}."
        raise WeightsError(f"{fault} {EXPLICIT_REMEDY}") from error
    if missing:
        raise WeightsError(f"STARLING_WEIGHTS names {folder}, which lacks {', '.join(missing)}. {EXPLICIT_REMEDY}")
    logger.info("Weights: %s, from STARLING_WEIGHTS; not checked against the lock", folder)
    return Located(folder, "explicit")


def _located(folder: Path, origin: Literal["baked", "downloaded"], reports: list[FileReport]) -> Located:
    digests = [report.sha256 for report in reports if report.name.endswith(".safetensors")]
    logger.info("Weights: %s (%s), matching the lock", folder, origin)
    return Located(folder, origin, digests[0] if len(digests) == 1 else None)
