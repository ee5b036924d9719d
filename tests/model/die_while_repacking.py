"""Repacks a checkpoint and stops in the middle, for its parent to kill: `python die_while_repacking.py FOLDER`."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from starling.model import packed_cache
from starling.model.ops import Packed


def repack() -> Iterator[tuple[str, Packed]]:
    yield "first", {"weight": torch.zeros(1 << 20, dtype=torch.uint8)}
    print("half way", flush=True)
    time.sleep(600)


folder = Path(sys.argv[1])
packed_cache.load_or_make(folder, "test-1", repack, [folder])
