"""Starling's command line: fetch and verify weights, quantize, evaluate, prepare a machine or an image."""

import argparse
import logging
import sys
from collections.abc import Sequence

from starling.command import exit_code
from starling.evaluate.command import add_evaluate_command
from starling.prepare import add_prepare_command
from starling.quantize.command import add_quantize_command
from starling.weights.command import add_weights_command

OTHERS = (
    "Other programs, each with its own --help: python -m starling.terminal (ask a server, or chat), starling.demo "
    "(make the demo model), starling.replicas (several replicas behind one address)."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m starling", description=__doc__, epilog=OTHERS)
    parser.set_defaults(stopped_note="")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_weights_command(subparsers)
    add_quantize_command(subparsers)
    add_evaluate_command(subparsers)
    add_prepare_command(subparsers)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs URLs, which may be signed
    return exit_code(lambda: args.run(args), args.stopped_note)


if __name__ == "__main__":
    sys.exit(main())
