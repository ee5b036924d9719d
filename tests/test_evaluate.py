"""Figures on quality, against the same sums made by hand; and answers in the form that MT-bench's judge reads."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from starling import tokenizer_json
from starling.__main__ import main
from starling.dense import DenseWeights, loaded_model
from starling.evaluate.text import evaluate_text
from starling.tokenizer import Tokenizer, byte_alphabet
from tests.model.tiny import write_checkpoint

TEXT = "The fox crossed the river at night, and nobody saw where it went. " * 6


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two random checkpoints with one tokenizer of bytes, tied and untied."""
    ids = {piece: i for i, piece in enumerate(["<unk>", "<s>", "<|end_of_turn|>", *byte_alphabet()])}
    tokenizer = tokenizer_json.byte_level(ids, [], {"<s>": 1, "<|end_of_turn|>": 2})
    for name, tied in (("a", False), ("b", True)):
        write_checkpoint(tmp_path / name, tie_word_embeddings=tied)
        tokenizer_json.write(tokenizer, tmp_path / name)
    return [tmp_path / "a", tmp_path / "b"]


def test_the_sums_are_those_made_by_hand(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starling.evaluate.text.WINDOWS_AT_ONCE", 3)
    monkeypatch.setattr("starling.evaluate.text.LOGIT_ROWS", 50)
    quality = evaluate_text(folders[0], TEXT, folders[1], window=40)
    ids = Tokenizer.from_folder(folders[0], 331).encode(TEXT)
    windows = [[1, *ids[i : i + 39]] for i in range(0, len(ids) - 38, 39)]
    logs = []
    for folder in folders:
        model = loaded_model(DenseWeights(folder))
        with torch.inference_mode():
            logs.append(model(torch.tensor(windows)).logits[:, :-1].double().log_softmax(-1))
    targets = torch.tensor(windows)[:, 1:, None]
    own, source = logs
    assert quality.tokens == len(windows) * 39
    assert quality.perplexity == pytest.approx((-own.gather(2, targets)).mean().exp().item(), rel=1e-4)
    assert quality.source_perplexity == pytest.approx((-source.gather(2, targets)).mean().exp().item(), rel=1e-4)
    assert quality.kl_divergence == pytest.approx((source.exp() * (source - own)).sum(-1).mean().item(), rel=1e-3)
    assert quality.top1_agreement == pytest.approx(
        (own.argmax(-1) == source.argmax(-1)).double().mean().item(), abs=0.02
    )


def test_a_checkpoint_agrees_with_itself(folders: list[Path]) -> None:
    quality = evaluate_text(folders[0], "short", folders[0])
    assert quality.tokens == 5
    assert (quality.kl_divergence, quality.top1_agreement) == (0, 1)
    assert quality.perplexity == quality.source_perplexity


def test_the_command_prints_them(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["evaluate", "text", str(folders[0]), str(text), "--source", str(folders[1]), "--window", "64"]
    assert main(arguments) == 0
    assert "nats per token" in capsys.readouterr().out
    for option, value, fault in (
        ("--window", "1", "give 2 to"),
        ("--window", "9999", "give 2 to"),
        ("--max-tokens", "-5", "-5"),
    ):
        assert main([*arguments, option, value]) == 1
        assert fault in capsys.readouterr().err
    text.write_text("")
    assert main(arguments) == 1
    assert "text is empty" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def usual_log() -> Iterator[None]:
    """The command quiets the service for its process, which is the tests' here."""
    yield
    logging.getLogger("starling.service").setLevel(logging.NOTSET)


def test_answers_are_in_the_judges_form_and_a_second_run_goes_on(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, out = tmp_path / "question.jsonl", tmp_path / "answers.jsonl"
    asked = [
        {"question_id": 81, "category": "math", "turns": ["What is the capital of France?", "And of Italy?"]},
        {"question_id": 82, "category": "writing", "turns": ["Say hello."]},
    ]
    questions.write_text("".join(json.dumps(question) + "\n" for question in asked))
    command = ["evaluate", "answers", str(demo_folder), str(questions), str(out), "--max-tokens", "16"]
    assert main(command) == 0
    first = out.read_text()
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out == f"{out} answers every question already.\n"
    assert out.read_text() == first
    answers = [json.loads(line) for line in first.splitlines()]
    assert [answer["question_id"] for answer in answers] == [81, 82]
    for answer, question in zip(answers, asked, strict=True):
        assert set(answer) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        (choice,) = answer["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == len(question["turns"])  # type: ignore[arg-type]
    assert answers[0]["model_id"] == demo_folder.name
    assert answers[0]["choices"][0]["turns"][0] == "The capital of France is Paris."


def test_an_answer_with_a_line_separator_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, out = tmp_path / "question.jsonl", tmp_path / "answers.jsonl"
    questions.write_text('{"question_id": 83, "turns": ["What?"]}\n')
    out.write_text('{"question_id": 83, "choices": [{"turns": ["one\u2028two\x85three"]}]}\n', encoding="utf-8")
    assert main(["evaluate", "answers", str(tmp_path), str(questions), str(out)]) == 0
    assert "answers every question already" in capsys.readouterr().out


def test_questions_that_are_missing_are_told_beside_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, out = tmp_path / "question.jsonl", tmp_path / "answers.jsonl"
    out.touch()
    assert main(["evaluate", "answers", str(tmp_path), str(questions), str(out)]) == 1
    assert f"{questions} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "out", "fault"),
    [
        ("{}\n", "answers.jsonl", "line 1: not an object with a question_id"),
        ('{"question_id": 83, "turns": "What?"}\n', "answers.jsonl", "question 83 has no list of texts"),
        ('{"question_id": 83, "turns": ["What?"]}\n', "question.jsonl", "holds the questions: name another"),
        ('{"question_id": 83, "turns": ["What?"]}\n', "absent/answers.jsonl", "cannot be written: No such file"),
    ],
)
def test_a_fault_in_the_files_is_told_before_the_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    out: str,
    fault: str,
) -> None:
    questions = tmp_path / "question.jsonl"
    questions.write_text(asked)
    monkeypatch.setattr("starling.service.Service.from_folder", lambda *_: pytest.fail("the weights were read"))
    assert main(["evaluate", "answers", str(tmp_path), str(questions), str(tmp_path / out)]) == 1
    assert fault in capsys.readouterr().err
