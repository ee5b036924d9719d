"""The whole forward pass: equal to transformers' own on the same matrices, and to itself however it is split."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from starling.model.mistral import Mistral
from starling.model.ops import Ops
from starling.model.ops.cpu import CpuOps
from starling.model.ops.reference import ReferenceOps
from tests.model.sequences import Sequence, some_and_all, step
from tests.model.tiny import transformers_model, write_checkpoint

BLOCK = 16
SHAPES: dict[str, dict[str, Any]] = {
    "mistral, window passed": {"sliding_window": 24},
    "mistral, head_dim of its own, no grouping": {"head_dim": 32, "num_key_value_heads": 8, "sliding_window": None},
    "llama, tied": {
        "architectures": ["LlamaForCausalLM"],
        "sliding_window": 24,  # transformers' Llama does not read it
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
        "quantization_config": {
            "quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True, "group_size": 32,
        },
    },
    "one key/value head, groups of 128": {
        "num_key_value_heads": 1,
        "intermediate_size": 256,
        "quantization_config": {
            "quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True, "group_size": 128,
        },
    },
}  # fmt: skip
IMPLEMENTATIONS: dict[str, Callable[[], Ops]] = {
    "reference": ReferenceOps,
    "cpu": lambda: CpuOps(precision="float32", kv_dtype=torch.float32),
}


class OpByOp:
    """CpuOps without its single call for all layers."""

    def __init__(self, ops: CpuOps) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        if name == "run_layers":
            raise AttributeError(name)
        return getattr(self._ops, name)


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(random.SystemRandom().randrange(2**32))
    write_checkpoint(folder, **SHAPES[request.param])
    return folder


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def model(request: pytest.FixtureRequest, folder: Path) -> Mistral:
    return Mistral.load(folder, IMPLEMENTATIONS[request.param]())


@pytest.fixture
def dice() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown when the test fails
    return random.Random(seed)


def prompt(dice: random.Random, length: int) -> list[int]:
    return [dice.randrange(331) for _ in range(length)]


def whole(model: Mistral, tokens: list[int]) -> torch.Tensor:
    """Logits of every token, in one step, over cache blocks in order."""
    blocks = -(-len(tokens) // BLOCK)
    return step(model, model.allocate_cache(blocks, BLOCK), [(Sequence(list(range(blocks))), tokens)])[0]


def test_logits_are_those_of_transformers(model: Mistral, folder: Path, dice: random.Random) -> None:
    tokens = prompt(dice, 70)
    with torch.inference_mode():
        expected = transformers_model(folder)(torch.tensor([tokens])).logits[0]
    assert torch.allclose(whole(model, tokens), expected, atol=1e-4, rtol=0)


def test_prefill_is_decode_token_by_token(model: Mistral, dice: random.Random) -> None:
    tokens = prompt(dice, 50)
    cache, sequence = model.allocate_cache(4, BLOCK), Sequence([2, 0, 3, 1])
    one_by_one = torch.cat([step(model, cache, [(sequence, [token])])[0] for token in tokens])
    assert torch.allclose(one_by_one, whole(model, tokens), atol=1e-4, rtol=0)


def test_chunks_are_the_whole(model: Mistral, dice: random.Random) -> None:
    tokens = prompt(dice, 70)
    cache, sequence = model.allocate_cache(8, BLOCK), Sequence(dice.sample(range(8), 5))
    chunks, left = [], tokens
    while left:
        size = dice.randint(1, 30)
        chunks += step(model, cache, [(sequence, left[:size])])
        left = left[size:]
    assert torch.allclose(torch.cat(chunks), whole(model, tokens), atol=1e-4, rtol=0)


def test_a_batch_gives_what_each_gives_alone(model: Mistral, dice: random.Random) -> None:
    lengths = [1, 40, 7, 66]
    prompts = [prompt(dice, length + 3) for length in lengths]
    cache = model.allocate_cache(24, BLOCK)
    blocks = dice.sample(range(24), 20)
    sequences = [Sequence(blocks[5 * i : 5 * i + 5]) for i in range(4)]
    for sequence, tokens, length in zip(sequences, prompts, lengths, strict=True):
        if length > 1:
            step(model, cache, [(sequence, tokens[:length])])
    # Now at positions 0, 40, 7 and 66: one prefills, the others decode.
    work = [(s, t[s.length :][: 4 if s.length == 0 else 1]) for s, t in zip(sequences, prompts, strict=True)]
    at = [sequence.length for sequence in sequences]
    together = step(model, cache, work)
    for tokens, first, logits in zip(prompts, at, together, strict=True):
        alone = whole(model, tokens[: first + len(logits)])[first:]
        assert torch.allclose(logits, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [ReferenceOps, CpuOps, lambda: OpByOp(CpuOps())])
def test_logits_of_some_tokens_are_those_computed_for_all(
    folder: Path, dice: random.Random, make: Callable[[], Ops]
) -> None:
    """To the bit on a CPU's kernels, leaving the same cache behind; plain torch's sums depend on the batch."""
    model = Mistral.load(folder, make())
    prompts = [prompt(dice, length) for length in (30, 1, 12)]
    for wanted in ([], [42], [0, 29, 30, 41], sorted(dice.sample(range(43), 20)), list(range(43))):
        some, whole = some_and_all(model, prompts, wanted)
        exact = not isinstance(model.ops, ReferenceOps)
        assert torch.equal(some, whole) if exact else torch.allclose(some, whole, atol=1e-4)


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_all_layers_in_one_call_equal_the_calls_one_by_one(folder: Path, dice: random.Random, precision: str) -> None:
    ops = CpuOps(2, precision)  # type: ignore[arg-type]
    fused, one_by_one = Mistral.load(folder, ops), Mistral.load(folder, OpByOp(ops))
    caches = [model.allocate_cache(10, BLOCK) for model in (fused, one_by_one)]
    sequences = [[Sequence(list(range(5))), Sequence(list(range(5, 10)))] for _ in range(2)]
    a, b = prompt(dice, 40), prompt(dice, 12)
    for work in ((a[:30], b[:1]), (a[30:31], b[1:7]), (a[31:], b[7:8])):
        logits = [
            torch.cat(step(model, cache, list(zip(own, work, strict=True))))
            for model, cache, own in zip((fused, one_by_one), caches, sequences, strict=True)
        ]
        assert torch.equal(*logits)
