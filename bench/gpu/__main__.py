"""The full-size model on this machine's GPU, against its memory and tensor cores, and against other engines.

    python -m bench.gpu --folder /tmp/full-size > bench/results/gpu-$(date +%F)-CARD.md

Random weights of the real model's exact size are made in the folder if it has none (4.2 GB). Sections can be selected
by name (`--only decode --only kernels`); one that fails says so, and the next begins. Peers are measured where they are
installed, each in a process of its own.
"""

import argparse
from datetime import date
from pathlib import Path

import torch

from bench import full_size
from bench.command import report_errors
from bench.gpu import models, sections
from bench.gpu.peers import PEERS
from starling.model.ops.cuda import CudaOps
from starling.model.ops.cuda.driver import can_overlap


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=full_size.DEFAULT, help="where the weights are, or are made")
    parser.add_argument("--only", action="append", choices=sections.SECTIONS, help="only this section; may be repeated")
    parser.add_argument("--quick", action="store_true", help="fewer contexts, batches and sizes")
    parser.add_argument("--peer", choices=PEERS, help="only one library's matrix products, in this process")
    parser.add_argument("--model", choices=models.MODELS, help="only one other engine's whole model, in this process")
    options = parser.parse_args()
    if options.model:
        sections.say(models.report(options.model, options.folder))
        return
    ops = CudaOps.on_gpu()
    serial = CudaOps.on_gpu(overlap=False) if can_overlap(ops.device) else None
    bench = sections.Bench(options.folder, ops, serial, options.quick)
    if options.peer:
        with torch.inference_mode():
            sections.peer_products(bench, options.peer)
        return
    sections.say(f"# The full-size model on a GPU, {date.today()}", "")
    sections.make_checkpoint(options.folder)
    sections.run(bench, options.only or list(sections.SECTIONS))


if __name__ == "__main__":
    main()
