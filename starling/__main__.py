"""The command line: `python -m starling …`."""

import argparse
import logging
import sys
from collections.abc import Sequence

from starling.evaluate.command import add_evaluate_command
from starling.prepare import add_prepare_command
from starling.quantize.command import add_quantize_command
from starling.weights.command import add_weights_command


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m starling", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_weights_command(subparsers)
    add_quantize_command(subparsers)
    add_evaluate_command(subparsers)
    add_prepare_command(subparsers)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs addresses, which may be signed
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
