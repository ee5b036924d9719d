"""Regenerates the demo model's channel scales, which `starling/demo.py` applies before it rounds.

    python -m starling.quantize.demo_scales

Needs requirements-reference.txt, and takes minutes. After an interruption, the same command resumes.
"""

import argparse
import shutil
import sys
from pathlib import Path

from starling import demo, tensor_file
from starling.command import exit_code
from starling.errors import NotInstalledError
from starling.quantize.calibration import BUILT_IN

SAMPLES, LENGTH = 128, 256  # the whole of the built-in text, in blocks of 256 tokens


def search(work: Path, out: Path) -> None:
    """Write the scales to `out`; `work` gets the full-precision model and AutoAWQ's own files, for comparison.

    Raises StarlingError and OSError.
    """
    try:
        from starling.quantize.layerwise import quantize  # here, since it needs AutoAWQ and --help does not
    except ImportError as error:
        raise NotInstalledError(error) from error
    source = demo.prepare(work / "demo-full", full_precision=True)
    quantized = work / "demo-awq"
    if demo.is_demo(quantized):  # from an earlier search
        shutil.rmtree(quantized)
    scales = quantize(source, quantized, BUILT_IN.read_text(encoding="utf-8"), demo.GROUP_SIZE, SAMPLES, LENGTH)
    tensor_file.write({name: found.half() for name, found in scales.items()}, out, demo.scales_metadata())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m starling.quantize.demo_scales", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("weights"), help="the models' folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=demo.SCALES, help="file to write (default: %(default)s)")
    options = parser.parse_args()

    def run() -> int:
        search(options.work, options.out)
        print(f"Wrote {options.out}. Raise VERSION in {demo.__file__}, so that existing demo models are rebuilt.")
        return 0

    return exit_code(run, "The same command resumes.")


if __name__ == "__main__":
    sys.exit(main())
