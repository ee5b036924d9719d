"""Answers to multi-turn questions through the service, in the format that MT-bench's judge reads."""

import io
import json
import time
import uuid
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from starling import text_file
from starling.errors import StarlingError
from starling.request import Request
from starling.service import Service

# FastChat's `gen_model_answer.py`: temperatures by category, so that answers are comparable with published ones.
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


def unanswered(questions: Path, out: Path) -> list[dict[str, Any]]:
    """The questions of an MT-bench file ({"question_id", "category", "turns"}) that `out` does not answer yet.

    This is how an interrupted run resumes. Raises StarlingError.
    """
    wanted = read_lines(questions)
    if out.exists() and out.samefile(questions):
        raise StarlingError(f"{out} holds the questions: name another file for the answers.")
    for question in wanted:
        turns = question.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise StarlingError(f"{questions}: question {question['question_id']}: its turns are not a list of texts.")
    known = {answer["question_id"] for answer in read_lines(out)} if out.exists() else set()
    return [question for question in wanted if question["question_id"] not in known]


def answer_questions(
    service: Service, model_id: str, questions: list[dict[str, Any]], out: TextIO, max_tokens: int = 1024, seed: int = 0
) -> None:
    """Ask every question turn by turn, and write a line per question in the format that FastChat's judge reads."""
    for question in tqdm(questions, desc="Answering", unit="question"):
        temperature = TEMPERATURES.get(question.get("category", ""), OTHER_TEMPERATURE)
        answer = {
            "question_id": question["question_id"],
            "answer_id": uuid.uuid4().hex,
            "model_id": model_id,
            "choices": [{"index": 0, "turns": _converse(service, question["turns"], temperature, max_tokens, seed)}],
            "tstamp": time.time(),
        }
        out.write(json.dumps(answer, ensure_ascii=False) + "\n")
        out.flush()


def appending(out: Path) -> TextIO:
    """Open `out` for appending. Raises StarlingError if it cannot be written."""
    try:
        return out.open("a", encoding="utf-8")
    except OSError as error:
        raise StarlingError(f"{out} cannot be written: {error.strerror}.") from error


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
    """The objects of a JSON Lines file. Raises StarlingError naming the first bad line."""
    # Not str.splitlines, which would also split at U+2028 and the like: JSON may hold them unescaped.
    lines = io.StringIO(text_file.read(path))
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entry["question_id"]
        except (ValueError, KeyError, TypeError) as error:
            raise StarlingError(f"{path}, line {number}: not an object with a question_id ({error}).") from error
        found.append(entry)
    return found
