"""Numbers on quality: perplexity, distance of a quantized checkpoint to its source, and answers for a judge.

The texts run through transformers' own model in float32, its weights read and dequantized as the forward pass reaches
them; so a 7B model and its source fit in a few GB, whatever serves them later.
"""

import json
import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from starling.dense import DenseWeights, streamed_model
from starling.errors import StarlingError
from starling.request import Request
from starling.service import Service
from starling.tokenizer import Tokenizer

WINDOWS_AT_ONCE = 16  # windows of text in one pass over the weights
LOGIT_ROWS = 1024  # logits of that many positions are held at a time: 2 x 0.13 GB for 32,002 tokens


@dataclass(frozen=True)
class Quality:
    """Means over `tokens` predicted tokens; what compares is None without a source."""

    tokens: int
    perplexity: float
    source_perplexity: float | None = None
    kl_divergence: float | None = None  # nats per token, of the source's distribution to the checkpoint's
    top1_agreement: float | None = None  # share of positions at which both find the same token likeliest


def evaluate_text(
    folder: Path, text: str, source: Path | None = None, window: int = 512, max_tokens: int | None = None
) -> Quality:
    """How well the checkpoint in `folder` predicts `text`, and how its predictions differ from those of `source`.

    The text is cut into windows of `window` tokens that start with the beginning-of-text token and know nothing of each
    other; every token but that one is predicted. Raises StarlingError.
    """
    folders = [folder] if source is None else [folder, source]
    weights = [DenseWeights(each) for each in folders]
    config = weights[0].config
    if any(each.config.vocab_size != config.vocab_size for each in weights):
        raise StarlingError(f"{folder} and {source} have different vocabularies, and cannot be compared.")
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
    """Full windows; the remainder of the text is left out, but for a text shorter than one window."""
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
    """float64 [4]: over all positions of `windows` [N, L], losses of both models, divergence, agreement."""
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


# -- answers for a judge ---------------------------------------------------------------------------------------------

# FastChat's `gen_model_answer.py`: temperatures by category, so that answers compare with published ones.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7


def answer_questions(
    service: Service, model_id: str, questions: Path, out: Path, max_tokens: int = 1024, seed: int = 0
) -> int:
    """Ask every question of an MT-bench file ({"question_id", "category", "turns"}), turn by turn.

    Appends to `out`, a line per question, in the form that FastChat's judge reads; questions that are answered there
    already are left out, so an interrupted run goes on. Returns how many were asked. Raises StarlingError.
    """
    known = {answer["question_id"] for answer in read_lines(out)} if out.exists() else set()
    asked = 0
    with out.open("a", encoding="utf-8") as file:
        for question in tqdm(read_lines(questions), desc="Answering", unit="question"):
            if question["question_id"] in known:
                continue
            temperature = TEMPERATURES.get(question.get("category", ""), OTHER_TEMPERATURE)
            answer = {
                "question_id": question["question_id"],
                "answer_id": uuid.uuid4().hex,
                "model_id": model_id,
                "choices": [
                    {"index": 0, "turns": _converse(service, question["turns"], temperature, max_tokens, seed)}
                ],
                "tstamp": time.time(),
            }
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            file.flush()
            asked += 1
    return asked


def _converse(service: Service, turns: list[str], temperature: float, max_tokens: int, seed: int) -> list[str]:
    messages: list[dict[str, str]] = []
    answers: list[str] = []
    for turn in turns:
        request = Request.parse(
            messages=messages, prompt=turn, temperature=temperature, top_p=1.0, max_tokens=max_tokens, seed=seed
        )
        answers.append(service.answer(request).text.strip())
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answers[-1]}]
    return answers


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSON Lines file. Raises StarlingError naming the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StarlingError(f"{path} cannot be read: {error}.") from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entry["question_id"]
        except (ValueError, KeyError, TypeError) as error:
            raise StarlingError(f"{path}, line {number}: not an object with a question_id ({error}).") from error
        found.append(entry)
    return found
