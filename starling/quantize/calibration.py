"""The calibration text, from which AWQ learns which inputs matter, as blocks of tokens."""

from pathlib import Path

from starling.errors import StarlingError
from starling.tokenizer import Tokenizer

# Prose, dialogue in Starling's format, code, numbers and other languages; written for this project. Enough for a small
# model; for a real one, give a file of your own with text like what it will see, 65,000 tokens or more.
BUILT_IN = Path(__file__).with_name("calibration.txt")


def calibration_blocks(text: str, tokenizer: Tokenizer, bos: int, samples: int, length: int) -> list[list[int]]:
    """At most `samples` blocks of `length` tokens, each starting with `bos`. Raises StarlingError if none is full."""
    if samples < 1 or length < 2:
        raise StarlingError(f"--samples is {samples} and --length {length}: give at least 1 block of 2 tokens.")
    ids = tokenizer.encode(text)
    body = length - 1
    blocks = [[bos, *ids[start : start + body]] for start in range(0, len(ids) - body + 1, body)][:samples]
    if not blocks:
        raise StarlingError(
            f"The calibration text has {len(ids)} tokens, less than one block of {length}. "
            "Give more text, or a smaller --length."
        )
    return blocks
