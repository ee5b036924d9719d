"""What rounding costs on the CPU: of activations, the output projection and the KV cache, against no rounding at all.

    python -m bench.cpu_precision --weights weights/demo

The text, Python's own help, runs through the model at each precision of the CPU kernels. Rounding works row by row, so
tokens that are marked as generated are rounded as in decoding, although they run through the model all at once.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch

from bench.command import checkpoint, count, report_errors
from bench.cpu import BLOCK, batch_of
from starling.model.config import ModelConfig
from starling.model.mistral import Mistral
from starling.model.ops.cpu import CpuOps
from starling.model.ops.cpu.ops import Precision
from starling.tokenizer import Tokenizer

TOPICS = ("assignment", "class", "compound", "exceptions", "function", "import", "naming", "objects")
WINDOW = 512  # tokens that attend to each other


@dataclass(frozen=True)
class Case:
    name: str
    precision: Precision
    prompt: bool = True  # tokens count as a prompt's, which `auto` rounds to 8 bits; otherwise as an answer's
    kv_dtype: torch.dtype = torch.float16


REFERENCE = Case("", "float32", kv_dtype=torch.float32)
CASES = (
    Case("float32: activations as they are, head fp16", "float32"),
    Case("int16: activations 16 bits, head fp16", "int16"),
    Case("auto, answers: activations 16 bits, head 8 bits", "auto", prompt=False),
    Case("auto, prompts: activations 8 bits, head 8 bits", "auto"),
    Case("int8: the same, and the head's activations 8 bits", "int8"),
)


def log_probabilities(weights: Path, case: Case, ids: torch.Tensor) -> torch.Tensor:
    """float32 [windows * WINDOW, V] of `ids` [windows, WINDOW]."""
    model = Mistral.load(weights, CpuOps(precision=case.precision, kv_dtype=case.kv_dtype))
    cache = model.allocate_cache(WINDOW // BLOCK, BLOCK)
    logits = [model.forward(batch_of(1, 0, WINDOW, case.prompt, window, all_logits=True), cache) for window in ids]
    return torch.cat(logits).log_softmax(dim=-1)


@report_errors
@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_precision", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=checkpoint, default="weights/demo", help="default: %(default)s")
    parser.add_argument("--windows", type=count, default=8, help=f"at most, of {WINDOW} tokens (default: %(default)s)")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_folder(options.weights, ModelConfig.from_folder(options.weights).vocab_size)
    encoded = tokenizer.encode("\n".join(topics[name] for name in TOPICS))
    windows = min(options.windows, len(encoded) // WINDOW)
    ids = torch.tensor(encoded[: windows * WINDOW]).view(windows, WINDOW)
    expected = log_probabilities(options.weights, REFERENCE, ids)
    print(f"{ids.numel()} tokens; the cache is fp16, the reference's float32.\n")
    print("| precision | mean KL, nats | largest KL | same likeliest token |\n|:--|--:|--:|--:|")
    for case in CASES:
        found = log_probabilities(options.weights, case, ids)
        divergence = (expected.exp() * (expected - found)).sum(dim=-1)
        same = (expected.argmax(dim=-1) == found.argmax(dim=-1)).float().mean()
        print(f"| {case.name} | {divergence.mean():.2g} | {divergence.max():.2g} | {same:.2%} |", flush=True)


if __name__ == "__main__":
    main()
