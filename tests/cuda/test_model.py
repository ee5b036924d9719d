"""The whole forward pass on the CUDA kernels: close to transformers', and the same however it is cut into steps."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from starling.model.mistral import Mistral
from starling.model.ops.cuda import CudaOps
from tests.cuda.emulator import EmulatedStream, emulated_ops
from tests.model.sequences import Sequence, batch_of, some_and_all, step
from tests.model.tiny import transformers_model, write_checkpoint

BLOCK = 16
QUANTIZED = {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True, "group_size": 32}
SHAPES: dict[str, dict[str, object]] = {
    "mistral, window passed": {"sliding_window": 24},
    "llama, tied": {
        "architectures": ["LlamaForCausalLM"], "sliding_window": None, "tie_word_embeddings": True,
        "quantization_config": QUANTIZED,
    },
}  # fmt: skip
DEVICES: list[object] = [
    pytest.param(emulated_ops, id="emulated"),
    pytest.param(CudaOps.on_gpu, id="gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    write_checkpoint(folder, num_hidden_layers=2, **SHAPES[request.param])
    return folder


@pytest.fixture(params=DEVICES)
def model(request: pytest.FixtureRequest, folder: Path) -> Mistral:
    make: Callable[[], CudaOps] = request.param
    return Mistral.load(folder, make())


def prompt_of(length: int) -> list[int]:
    return [random.randrange(331) for _ in range(length)]


def test_logits_are_near_those_of_transformers(model: Mistral, folder: Path) -> None:
    """fp16 activations, and weights that fp16 holds exactly up to their scale: each of some 20 roundings on the way to
    a logit is off by 2^-11 at most, and they add up as a random walk does."""
    tokens = prompt_of(57)
    cache = model.allocate_cache(8, BLOCK)
    (found,) = step(model, cache, [(Sequence([5, 0, 3, 7]), tokens)])
    with torch.inference_mode():
        wanted = transformers_model(folder)(torch.tensor([tokens])).logits[0]
    assert float((found.cpu() - wanted).norm() / wanted.norm()) < 2**-11 * 20**0.5 * 2


def test_however_it_is_cut(model: Mistral) -> None:
    """Whole, in chunks, token by token, and alongside another sequence: the same logits to the bit."""
    tokens, other = prompt_of(41), prompt_of(19)
    cache = model.allocate_cache(24, BLOCK)
    (whole,) = step(model, cache, [(Sequence([9, 4, 1]), tokens)])
    cut, beside = Sequence([2, 6, 8]), Sequence([11, 12])
    parts = []
    for start, end in [(0, 17), (17, 18), (18, 19), (19, 36), (36, 37), (37, 41)]:
        part, *_ = step(model, cache, [(cut, tokens[start:end]), (beside, other[start // 3 : start // 3 + 3])])
        parts.append(part)
    assert torch.equal(torch.cat(parts), whole)


def test_the_logits_that_are_wanted_are_those_of_all(model: Mistral) -> None:
    """To the bit, and they leave the same cache."""
    prompts = [prompt_of(length) for length in (30, 1, 12)]
    for wanted in ([], [42], [0, 29, 30, 41], sorted(random.sample(range(43), 20))):
        assert torch.equal(*some_and_all(model, prompts, wanted))


@pytest.mark.parametrize("prompt", [1, 2, 7, 33])
def test_kernels_that_begin_early(folder: Path, prompt: int) -> None:
    """As from sm_90 on: the last token's logits are the same to the bit, for a prompt and then for short steps."""
    stream = EmulatedStream()
    plain, early = Mistral.load(folder, emulated_ops()), Mistral.load(folder, emulated_ops(stream))
    caches = [model.allocate_cache(8, BLOCK) for model in (plain, early)]
    sequences = [Sequence([5, 0, 3]), Sequence([5, 0, 3])]
    for tokens in (prompt_of(prompt), prompt_of(1), prompt_of(2)):
        logits = []
        for model, cache, sequence in zip((plain, early), caches, sequences, strict=True):
            batch = replace(batch_of(model, cache, [(sequence, tokens)]), logit_rows=torch.tensor([len(tokens) - 1]))
            with torch.inference_mode():
                logits.append(model.forward(batch, cache))
        stream.synchronize()
        assert torch.equal(*logits)


def test_all_layers_at_once_are_the_operations_one_by_one(model: Mistral) -> None:
    """Except for what the fused ones keep in float32: the sums that enter the residual stream, and gate and up."""
    tokens = prompt_of(9)
    cache = model.allocate_cache(8, BLOCK)
    (fused,) = step(model, cache, [(Sequence([5]), tokens)])

    class OneByOne(Mistral):
        def forward(self, batch: object, cache: object) -> torch.Tensor:
            ops = self.ops
            x = self.run_layers(ops.embed(batch.token_ids, self.embedding), batch, cache)  # type: ignore[attr-defined, arg-type]
            return ops.head(ops.rms_norm(x, self.norm, self.config.rms_norm_eps), self.head)

    (one_by_one,) = step(OneByOne(**model.__dict__), cache, [(Sequence([3]), tokens)])
    assert float((fused - one_by_one).norm() / fused.norm()) < 2**-11 * 20**0.5 * 2
