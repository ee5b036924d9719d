"""`python -m starling prepare`: now what a first start would do, for an image's build or a machine's set-up.

The CUDA kernels are compiled for every kind of GPU that they know, which needs none; or the CPU kernels for every
instruction set, and where the weights are there, they are repacked: for a CPU, since a GPU packs them at every start.
Later starts find both.
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
    subparsers.add_parser("prepare", help=text, description=text).set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: done, or done as far as there are weights, and a use for them. Raises StarlingError and OSError."""
    import torch  # seconds that no other command should wait for

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
    with suppress(NoCompilerError):  # of which choose_ops warns
        compile_ahead()  # also for what an image's later machines may have
    ops = choose_ops(settings.device, settings.threads, settings.cpu_precision, settings.kv_dtype)
    print(f"Operations: {ops.name} on {ops.device}.")
    if ops.layout is None:
        return 0  # a GPU packs the weights as it reads them, and keeps nothing for a later start
    try:
        folder = locate_weights(settings).folder
    except WeightsError:
        if settings.weights is not None or settings.allow_download:
            raise
        print("No weights are here yet; they are repacked at the first start that finds them.")
        return 0
    Mistral.load(folder, ops)
    print(f"Weights: {folder}, repacked.")
    return 0
