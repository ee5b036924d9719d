"""A benchmark's command line: what is wrong with it is told in a line, before anything is made or loaded."""

import argparse
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from starling.errors import NotInstalledError, StarlingError

Result = TypeVar("Result")
OF_THE_REFERENCE = ("transformers", "accelerate")


def told(main: Callable[[], Result]) -> Callable[[], Result]:
    """`main`, which a fault that has a message ends with that message."""

    @functools.wraps(main)
    def run() -> Result:
        try:
            return main()
        except StarlingError as error:
            raise SystemExit(str(error)) from error
        except ModuleNotFoundError as error:
            if error.name not in OF_THE_REFERENCE:
                raise
            raise SystemExit(str(NotInstalledError(error))) from error

    return run


def checkpoint(text: str) -> Path:
    """An option's type: the folder of a checkpoint."""
    folder = Path(text)
    if not (folder / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no checkpoint's folder: it holds no config.json")
    return folder


def count(text: str) -> int:
    """An option's type: 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def program(text: str) -> Path:
    """An option's type: something that can be run."""
    found = shutil.which(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no program")
    return Path(found)
