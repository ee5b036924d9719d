"""The calibration text → blocks of tokens."""

from pathlib import Path

import pytest

from starling import tokenizer_json
from starling.errors import StarlingError
from starling.quantize.calibration import calibration_blocks
from starling.tokenizer import Tokenizer, byte_alphabet


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """A token per byte."""
    ids = {piece: i for i, piece in enumerate(["<s>", *byte_alphabet()])}
    tokenizer_json.write(tokenizer_json.byte_level(ids, [], {"<s>": 0}), tmp_path)
    return Tokenizer.from_folder(tmp_path, len(ids))


def test_blocks_are_full_and_each_starts_with_bos(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abcdefgh")
    blocks = [[0, *ids[:3]], [0, *ids[3:6]]]
    assert calibration_blocks("abcdefgh", tokenizer, 0, samples=9, length=4, context=4) == blocks
    assert calibration_blocks("abcdefgh", tokenizer, 0, samples=1, length=4, context=4) == blocks[:1]


@pytest.mark.parametrize(
    ("samples", "length", "context"), [(0, 4, 16), (-1, 4, 16), (9, 1, 16), (9, 0, 16), (9, 10, 16), (9, 5, 4)]
)
def test_impossible_blocks_are_refused(tokenizer: Tokenizer, samples: int, length: int, context: int) -> None:
    with pytest.raises(StarlingError, match="--length"):
        calibration_blocks("abcdefgh", tokenizer, 0, samples, length, context)
