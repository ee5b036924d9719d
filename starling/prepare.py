"""`python -m starling prepare`: do now what a first start would do, when building an image or setting up a machine.

The CUDA kernels are compiled for every GPU architecture that they support, which needs no GPU; or the CPU kernels for
every instruction set. Weights that are present are repacked, for a CPU only: a GPU repacks them at every start. Later
starts find both.
"""

import argparse
import os
from contextlib import suppress

from starling.errors import WeightsError
from starling.settings import Settings
from starling.weights import locate_weights


def add_prepare_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `prepare` to the command line; `args.run(args)` returns the exit code."""
    text = "compile the kernels and repack the weights now, so that no start has to"
    where = "The weights are those of STARLING_WEIGHTS, or of weights/; without any, only the kernels are compiled."
    subparsers.add_parser("prepare", help=text, description=f"{text}. {where}").set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Returns 0, also where there are no weights yet or none to repack. Raises StarlingError and OSError."""
    import torch  # takes seconds, which no other command should wait for

    from starling.model.mistral import Mistral
    from starling.model.ops import choose_ops
    from starling.model.ops.cpu.compiler import NoCompilerError, compile_ahead
    from starling.model.ops.cuda import nvrtc

    settings = Settings.from_env(os.environ)
    if settings.device == "cuda" or (settings.device == "auto" and torch.version.cuda is not None):
        nvrtc.compile_ahead()
        print(f"CUDA kernels: compiled for {', '.join(f'sm_{arch}' for arch in nvrtc.ARCHS)}.")
    if settings.device == "cuda":
        return 0  # without asking for a GPU: the machine that builds an image may have none
    with suppress(NoCompilerError):  # choose_ops warns of it
        compile_ahead()  # for every instruction set: an image may run on other machines
    ops = choose_ops(settings.device, settings.threads, settings.cpu_precision, settings.kv_dtype)
    print(f"Operations: {ops.name} on {ops.device}.")
    if ops.layout is None:
        return 0  # a GPU repacks the weights as it reads them, and keeps nothing for a later start
    try:
        folder = locate_weights(settings).folder
    except WeightsError:
        if settings.weights is not None or settings.allow_download:
            raise
        print("There are no weights yet; the first start that finds them will repack them.")
        return 0
    Mistral.load(folder, ops)
    print(f"Weights: {folder}, repacked.")
    return 0
