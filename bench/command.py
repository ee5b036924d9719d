"""The benchmarks' command lines: a fault is reported in one line, before anything is made or loaded."""

import argparse
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from starling.errors import NotInstalledError, StarlingError

Result = TypeVar("Result")
REFERENCE_PACKAGES = ("transformers", "accelerate")


def report_errors(main: Callable[[], Result]) -> Callable[[], Result]:
    """Make `main` exit with the message of an expected error, without a traceback."""

    @functools.wraps(main)
    def run() -> Result:
        try:
            return main()
        except StarlingError as error:
            raise SystemExit(str(error)) from error
        except ModuleNotFoundError as error:
            if error.name not in REFERENCE_PACKAGES:
                raise
            raise SystemExit(str(NotInstalledError(error))) from error

    return run


def checkpoint(text: str) -> Path:
    """An option's type: a checkpoint folder."""
    folder = Path(text)
    if not (folder / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a checkpoint folder: it holds no config.json")
    return folder


def count(text: str) -> int:
    """An option's type: 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def program(text: str) -> Path:
    """An option's type: an executable program."""
    found = shutil.which(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an executable program")
    return Path(found)
