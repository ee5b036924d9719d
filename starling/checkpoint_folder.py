"""Which checkpoint folder this process serves. A wrong model is never served in silence."""

from pathlib import Path

from starling.errors import WeightsError
from starling.settings import Settings

DEFAULT = Path(__file__).resolve().parent.parent / "weights" / "starling-lm-7b-alpha-awq"
NEEDED = ("config.json", "tokenizer.json", "*.safetensors")


def locate(settings: Settings) -> Path:
    """The folder that STARLING_WEIGHTS names, else the real weights'. Raises WeightsError that says what is missing."""
    folder = settings.weights or DEFAULT
    missing = [pattern for pattern in NEEDED if not any(folder.glob(pattern))]
    if missing:
        raise WeightsError(
            f"No weights to serve: {folder} has no {', no '.join(missing)}.\n"
            "  To fetch Starling-LM-7B-alpha (AWQ, 4.15 GB):  .venv/bin/python -m starling weights pull\n"
            "  To serve a checkpoint folder that you have:    STARLING_WEIGHTS=FOLDER scripts/serve\n"
            "  To try it with a small model instead:          scripts/demo"
        )
    return folder
