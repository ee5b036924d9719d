"""`python -m starling quantize SOURCE OUT`."""

import argparse
from pathlib import Path

from starling import text_file
from starling.errors import NotInstalledError
from starling.model.config import GROUP_SIZES
from starling.quantize.calibration import BUILT_IN


def add_quantize_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `quantize` to the command line; `args.run(args)` returns the exit code."""
    text = "quantize a full-precision Mistral or Llama checkpoint to AWQ; the same command resumes an interrupted run"
    parser = subparsers.add_parser("quantize", help=text, description=text)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the checkpoint's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make; it appears once it is complete")
    parser.add_argument(
        "--group-size",
        type=int,
        choices=sorted(GROUP_SIZES),
        default=128,
        help="weights per scale (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        default=BUILT_IN,
        help="text like what the model will see, 65,000 tokens for the default sizes (default: a short built-in text)",
    )
    parser.add_argument("--samples", type=int, default=128, help="blocks of text to use at most (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per block (default: %(default)s)")
    parser.set_defaults(run=run, stopped_note="The same command resumes after the last finished layer.")


def run(args: argparse.Namespace) -> int:
    """Returns 0. Raises StarlingError and OSError."""
    try:
        from starling.quantize.layerwise import quantize  # transformers and AutoAWQ: seconds to import
    except ImportError as error:
        raise NotInstalledError(error) from error
    text = text_file.read(args.calibration)
    quantize(args.source, args.out, text, args.group_size, args.samples, args.length)
    print(args.out)
    return 0
