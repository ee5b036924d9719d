"""The calibration text, from which AWQ learns which inputs matter, as blocks of tokens."""

from pathlib import Path

from starling.errors import StarlingError
from starling.tokenizer import Tokenizer

# Prose, dialogue in Starling's format, code, numbers and other languages; written for this project. Enough for a small
# model; for a real one, give a file of your own with text like what it will see, 65,000 tokens or more.
BUILT_IN = Path(__file__).with_name("calibration.txt")


def calibration_blocks(
    text: str, tokenizer: Tokenizer, bos: int, samples: int, length: int, context: int
) -> list[list[int]]:
    """At most `samples` blocks of `length` tokens, each starting with `bos`. `context`: the most that the model takes.

    Raises StarlingError if no block is full.
    """
    if samples < 1 or not 2 <= length <= context:
        raise StarlingError(
            f"--samples is {samples} and --length {length}: give at least 1 block of 2 to {context} tokens."
        )
    ids = tokenizer.encode(text)
    body = length - 1
    blocks = [[bos, *ids[start : start + body]] for start in range(0, len(ids) - body + 1, body)][:samples]
    if not blocks:
        raise StarlingError(
            f"The calibration text has {len(ids)} tokens, less than one block of {length}. "
            "Give more text, or a smaller --length."
        )
    return blocks
