"""Greedy answers of our engine and of the reference, token by token; where they diverge, both models' two logits.

    python -m bench.parity --weights weights/demo

Engines that round differently diverge sooner or later, where two tokens are almost equally likely. The gap says how
nearly equal: the logit of the token that an engine chose, less that of the token that the other chose. Two gaps near 0
are a tie; a wide gap in the reference would be a fault of ours.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.command import checkpoint, count, report_errors
from starling.chat import END_OF_TURN, Chat
from starling.engine.cache import BlockCache
from starling.engine.engine import TokenStream
from starling.engine.inputs import StepInputs
from starling.engine.runner import to_batch
from starling.engine.scheduler import Work
from starling.engine.sequence import SamplingParams, Sequence
from starling.model.mistral import Mistral
from starling.model.ops import choose_ops
from starling.request import Request
from starling.service import load_engine
from starling.settings import Settings
from starling.tokenizer import Tokenizer

BLOCK_SIZE = 16
LIMIT_S = 600.0  # waiting longer for a delivery is a fault

REQUESTS = {
    "chat": Request.parse(prompt="What is the capital of France?"),
    "chat, a list": Request.parse(prompt="Name three rivers in Africa and one fact about each."),
    "chat, a story": Request.parse(prompt="Tell me a story about a fox who crosses a river."),
    "chat, system prompt": Request.parse(prompt="Who are you?", system_prompt="You are a terse pirate."),
    "chat, three turns": Request.parse(
        messages=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "My name is Ada, and I like bridges."},
            {"role": "assistant", "content": "Nice to meet you, Ada. Which bridge do you like best?"},
        ],
        prompt="The one in Porto. What is my name?",
    ),
    "code": Request.parse(prompt="Implement quicksort using C++", mode="code"),
    "code, two turns": Request.parse(
        messages=[
            {"role": "user", "content": "Write a Python function that adds two numbers."},
            {"role": "assistant", "content": "def add(a, b):\n    return a + b"},
        ],
        prompt="Now make it multiply.",
        mode="code",
    ),
    "chat, long": Request.parse(
        prompt="Summarise this in one sentence: "
        + " ".join(f"On day {day} the boat sailed {7 * day % 31} miles and saw {day % 5} whales." for day in range(60))
    ),
}


@dataclass(frozen=True)
class Divergence:
    """The first token on which two greedy answers differ."""

    index: int
    our_token: int
    reference_token: int
    our_logits: tuple[float, float]  # our model's, of our token and of the reference's
    reference_logits: tuple[float, float]  # the reference model's, of the same two

    @property
    def gaps(self) -> tuple[float, float]:
        """How much more likely each engine (ours first) found its own token than the other's, in logits."""
        return self.our_logits[0] - self.our_logits[1], self.reference_logits[1] - self.reference_logits[0]


@dataclass(frozen=True)
class Comparison:
    name: str
    prompt_tokens: int
    ours: list[int]
    reference: list[int]
    divergence: Divergence | None


def compare_answers(folder: Path, settings: Settings, max_tokens: int = 64) -> list[Comparison]:
    """Ask both engines every request of REQUESTS, greedily."""
    from starling.reference import ReferenceEngine  # not installed everywhere: `report_errors` says so

    model = Mistral.load(
        folder, choose_ops(settings.device, settings.threads, settings.cpu_precision, settings.kv_dtype)
    )
    ours = load_engine(folder, settings)
    reference = ReferenceEngine.from_folder(folder, settings)
    tokenizer = Tokenizer.from_folder(folder, model.config.vocab_size)
    end = tokenizer.token_id(END_OF_TURN)
    chat = Chat(tokenizer, model.config.bos_token_id, end)
    params = SamplingParams(max_tokens, frozenset({end, *model.config.eos_token_ids}), seed=0)
    found = []
    for name, request in REQUESTS.items():
        prompt = chat.prompt_ids(request)
        left, right = _take(ours.submit(prompt, params)), _take(reference.submit(prompt, params))
        divergence = None
        differing = [i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b]
        if differing:
            at = differing[0]
            pair = [left[at], right[at]]
            divergence = Divergence(
                index=at,
                our_token=left[at],
                reference_token=right[at],
                our_logits=_pair(our_logits(model, prompt, left[:at])[pair]),
                reference_logits=_pair(reference.logits(prompt + left[:at])[pair]),
            )
        found.append(Comparison(name, len(prompt), left, right, divergence))
    ours.close()
    reference.close()
    return found


def _take(stream: TokenStream) -> list[int]:
    tokens: list[int] = []
    while True:
        delivery = stream.get(LIMIT_S)
        if delivery is None:
            raise TimeoutError(f"no token came within {LIMIT_S:.0f} s")
        if delivery.error is not None:
            raise delivery.error
        tokens += delivery.tokens
        if delivery.finish is not None:
            return tokens


@torch.inference_mode()
def our_logits(model: Mistral, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """float32 [V] after prompt and answer, computed as in the engine, which may round the two differently."""
    sequence = Sequence(0, prompt, SamplingParams(1, frozenset(), 0))
    sequence.tokens += answer
    length = len(sequence.tokens)
    blocks = -(-length // BLOCK_SIZE) + 1
    books = BlockCache(blocks, BLOCK_SIZE, rows=1, max_positions=length + BLOCK_SIZE, window=None)
    books.admit(sequence)
    assert books.grow(sequence, length)
    work = Work(sequence, 0, length, [], samples=True)
    batch = to_batch(StepInputs.of([work], books), model.ops.device)
    return model.forward(batch, model.allocate_cache(blocks, BLOCK_SIZE))[-1]


def _pair(logits: torch.Tensor) -> tuple[float, float]:
    first, second = logits.tolist()
    return first, second


def report(found: list[Comparison]) -> str:
    lines = [
        f"{'request':<22} {'prompt':>6} {'tokens':>6} {'equal':>6}   where they diverge: gap in ours, in the reference"
    ]
    for case in found:
        count = max(len(case.ours), len(case.reference))
        equal = count if case.divergence is None else case.divergence.index
        line = f"{case.name:<22} {case.prompt_tokens:>6} {count:>6} {equal:>6}"
        if case.divergence is not None:
            ours, reference = case.divergence.gaps
            line += f"   {ours:.4f}, {reference:.4f}  (logits {case.divergence.our_logits[0]:.3f} and "
            line += f"{case.divergence.our_logits[1]:.3f}; {case.divergence.reference_logits[0]:.3f} and "
            line += f"{case.divergence.reference_logits[1]:.3f})"
        lines.append(line)
    return "\n".join(lines)


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=checkpoint, required=True, help="an AWQ checkpoint folder")
    parser.add_argument(
        "--precision", choices=("auto", "int8", "int16", "float32"), default="auto", help="of activations, on a CPU"
    )
    parser.add_argument("--max-tokens", type=count, default=64, help="of an answer, at most (default: %(default)s)")
    options = parser.parse_args()
    exact = options.precision == "float32"
    settings = Settings(cpu_precision=options.precision, kv_dtype="float32" if exact else "float16")
    print(report(compare_answers(options.weights, settings, options.max_tokens)))


if __name__ == "__main__":
    main()
