"""How well a checkpoint predicts a text, and how far a quantized one is from its source.

The text runs through transformers' own model in float32, its weights read and dequantized as the forward pass reaches
them; so two 7B checkpoints take at most 12 GB of resident memory, 8 GB of it their own mapped files.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from starling.dense import DenseWeights, streamed_model
from starling.errors import StarlingError
from starling.tokenizer import Tokenizer

WINDOWS_AT_ONCE = 16  # windows of text in one pass over the weights
LOGIT_ROWS = 1024  # positions whose logits are held at a time: 2 x 0.13 GB for a vocabulary of 32,002


@dataclass(frozen=True)
class Quality:
    """Means over `tokens` predicted tokens; comparisons are None without a source."""

    tokens: int
    perplexity: float
    source_perplexity: float | None = None
    kl_divergence: float | None = None  # nats per token, KL(source || checkpoint)
    top1_agreement: float | None = None  # share of positions where both rank the same token first


def evaluate_text(
    folder: Path, text: str, source: Path | None = None, window: int = 512, max_tokens: int | None = None
) -> Quality:
    """How well the checkpoint in `folder` predicts `text`, and how its predictions differ from those of `source`.

    The text is cut into windows of `window` tokens that each start with the BOS token and are independent of each
    other; every token but that one is predicted. Raises StarlingError.
    """
    folders = [folder] if source is None else [folder, source]
    weights = [DenseWeights(each) for each in folders]
    config = weights[0].config
    if any(each.config.vocab_size != config.vocab_size for each in weights):
        raise StarlingError(f"{folder} and {source} have different vocabularies and cannot be compared.")
    if not 2 <= window <= config.max_position_embeddings:
        raise StarlingError(f"The window is {window} tokens; give 2 to {config.max_position_embeddings}.")
    if max_tokens is not None and max_tokens < 1:
        raise StarlingError(f"max_tokens is {max_tokens}: there is nothing to predict. Give 1 or more.")
    ids = Tokenizer.from_folder(folder, config.vocab_size).encode(text)[:max_tokens]
    windows = _windows(ids, config.bos_token_id, window)
    models = [streamed_model(each) for each in weights]
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in tqdm(list(_batches(windows)), desc="Evaluating", unit="pass"):
        sums += _sums(models, batch)
    count = sum(len(each) - 1 for each in windows)
    loss, source_loss, kl, same = (sums / count).tolist()
    if source is None:
        return Quality(count, math.exp(loss))
    return Quality(count, math.exp(loss), math.exp(source_loss), kl, same)


def _windows(ids: list[int], bos: int, window: int) -> list[list[int]]:
    """Full windows, without the remainder of the text; a text shorter than one window is used whole."""
    step = window - 1
    whole = [[bos, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]
    windows = whole or [[bos, *ids]]
    if len(windows[0]) < 2:
        raise StarlingError("The text is empty: there is nothing to predict.")
    return windows


def _batches(windows: list[list[int]]) -> Iterator[torch.Tensor]:
    for i in range(0, len(windows), WINDOWS_AT_ONCE):
        yield torch.tensor(windows[i : i + WINDOWS_AT_ONCE])


@torch.inference_mode()
def _sums(models: list[PreTrainedModel], windows: torch.Tensor) -> torch.Tensor:
    """float64 [4]: both models' losses, divergence and agreement, summed over all positions of `windows` [N, L]."""
    hidden = [_hidden(model, windows[:, :-1]) for model in models]  # each [N * (L - 1), H]
    targets = windows[:, 1:].flatten()
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        logs = [model.lm_head(states[rows]).log_softmax(dim=-1) for model, states in zip(models, hidden, strict=True)]
        for i, log in enumerate(logs):
            sums[i] -= log.gather(1, targets[rows, None]).sum(dtype=torch.float64)
        if len(logs) == 2:
            log, reference = logs
            sums[2] += (reference.exp() * (reference - log)).sum(dtype=torch.float64)
            sums[3] += (log.argmax(dim=-1) == reference.argmax(dim=-1)).sum()
    return sums


def _hidden(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = model.model(ids, use_cache=False).last_hidden_state
    return states.flatten(0, 1)
