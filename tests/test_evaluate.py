"""Figures on quality, against the same sums by hand; and answers in the format that MT-bench's judge reads."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from starling import tokenizer_json
from starling.__main__ import main
from starling.dense import DenseWeights, loaded_model, streamed_model
from starling.errors import INSTALL_REFERENCE, CheckpointError, StarlingError
from starling.evaluate.answers import answer_questions, appending, unanswered
from starling.evaluate.text import evaluate_text
from starling.request import Request
from starling.settings import Settings
from starling.tokenizer import Tokenizer, byte_alphabet
from tests.model.tiny import write_checkpoint

TEXT = "The fox crossed the river at night, and nobody saw where it went. " * 6


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two random checkpoints, untied and tied, with the same byte-level tokenizer."""
    ids = {piece: i for i, piece in enumerate(["<unk>", "<s>", "<|end_of_turn|>", *byte_alphabet()])}
    tokenizer = tokenizer_json.byte_level(ids, [], {"<s>": 1, "<|end_of_turn|>": 2})
    for name, tied in (("a", False), ("b", True)):
        write_checkpoint(tmp_path / name, tie_word_embeddings=tied)
        tokenizer_json.write(tokenizer, tmp_path / name)
    return [tmp_path / "a", tmp_path / "b"]


def test_the_sums_equal_those_by_hand(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
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
    quality = evaluate_text(folders[0], "short", folders[0], window=1024)  # as many tokens as the model has positions
    assert quality.tokens == 5
    assert (quality.kl_divergence, quality.top1_agreement) == (0, 1)
    assert quality.perplexity == quality.source_perplexity
    assert evaluate_text(folders[0], "x" * 78, window=40).tokens == 78, "two windows, and nothing is left over"


def test_other_vocabularies_are_not_compared(folders: list[Path]) -> None:
    write_checkpoint(folders[1], vocab_size=400)
    with pytest.raises(StarlingError, match="different vocabularies"):
        evaluate_text(folders[0], TEXT, folders[1])


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size"])
@pytest.mark.parametrize("tied", [False, True])
def test_matrices_of_another_shape_are_reported(folders: list[Path], tied: bool, key: str) -> None:
    config = json.loads((folders[tied] / "config.json").read_text())
    (folders[tied] / "config.json").write_text(json.dumps(config | {key: config[key] + 128}))
    for model in (loaded_model, streamed_model):
        with pytest.raises(CheckpointError, match=f"does not fit its config.json: .*{config[key] + 128}"):
            model(DenseWeights(folders[tied]))


def test_the_command_prints_them(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["evaluate", "text", str(folders[0]), str(text), "--source", str(folders[1]), "--window", "64"]
    assert main(arguments) == 0
    assert "nats per token" in capsys.readouterr().out
    assert main([*arguments, "--max-tokens", "50"]) == 0
    assert capsys.readouterr().out.startswith("tokens             50\n")
    for option, value, fault in (
        ("--window", "1", "give 2 to"),
        ("--window", "9999", "give 2 to"),
        ("--max-tokens", "-5", "-5"),
    ):
        assert main([*arguments, option, value]) == 1
        assert fault in capsys.readouterr().err
    for content, fault in ((b"", "text is empty"), (b"\xff", f"{text} cannot be read: 'utf-8' codec")):
        text.write_bytes(content)
        assert main(arguments) == 1
        assert fault in capsys.readouterr().err


def test_an_interrupted_evaluation_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr("starling.evaluate.text.evaluate_text", end)
    assert main(["evaluate", "text", str(tmp_path), str(tmp_path / "text.txt")]) == 130
    assert capsys.readouterr().err == "\nStopped.\n"


def test_without_transformers_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "starling.evaluate.text")  # so that it is imported again
    monkeypatch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
    assert main(["evaluate", "text", str(tmp_path), str(tmp_path / "text.txt")]) == 1
    assert capsys.readouterr().err == f"transformers is not installed. {INSTALL_REFERENCE}\n"


@pytest.fixture(autouse=True)
def usual_log() -> Iterator[None]:
    """The command silences the service's log for its whole process, which here is that of the tests."""
    yield
    logging.getLogger("starling.service").setLevel(logging.NOTSET)


def test_answers_are_in_the_judges_format_and_a_second_run_resumes(
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


class Noting:
    """A fake service: answers with the question's number, and records the requests."""

    def __init__(self, out: Path) -> None:
        self.requests: list[Request] = []
        self.kept: list[int] = []  # answers in the file at each turn
        self._out = out

    def answer(self, request: Request) -> SimpleNamespace:
        self.requests.append(request)
        self.kept.append(len(self._out.read_text().splitlines()))
        return SimpleNamespace(text=f" {len(self.requests)}\n")


def test_questions_without_an_answer_are_asked_as_mt_bench_asks_them(tmp_path: Path) -> None:
    questions, out = tmp_path / "question.jsonl", tmp_path / "answers.jsonl"
    categories = {81: "math", 82: "stem", 83: "reasoning", 84: "of our own"}
    asked = [{"question_id": i, "category": name, "turns": [f"{i}?", "So?"]} for i, name in categories.items()]
    questions.write_text("".join(json.dumps(question) + "\n" for question in asked))
    earlier = '{"question_id": 83, "of": "an earlier run"}\n'
    out.write_text(earlier)
    service = Noting(out)
    with appending(out) as file:
        answer_questions(service, "it", unanswered(questions, out), file, max_tokens=77)  # type: ignore[arg-type]
    assert service.kept == [1, 1, 2, 2, 3, 3], "an answer is kept before the next question is asked"
    assert out.read_text().startswith(earlier)
    answers = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert [(answer["question_id"], answer["model_id"]) for answer in answers] == [(81, "it"), (82, "it"), (84, "it")]
    assert [answer["choices"][0]["turns"] for answer in answers] == [["1", "2"], ["3", "4"], ["5", "6"]]
    assert [request.temperature for request in service.requests] == [0, 0, 0.1, 0.1, 0.7, 0.7]
    first, second = service.requests[:2]
    assert (first.prompt, first.max_tokens, first.top_p, first.seed) == ("81?", 77, 1, 0)  # top_p 1: nothing filtered
    turns = [{"role": "user", "content": "81?"}, {"role": "assistant", "content": "1"}]
    assert second == Request.parse(prompt="So?", messages=turns, temperature=0, max_tokens=77, top_p=1, seed=0), (
        "with the turns before it"
    )


def test_an_answer_with_a_line_separator_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, out = tmp_path / "question.jsonl", tmp_path / "answers.jsonl"
    questions.write_text('{"question_id": 83, "turns": ["What?"]}\n')
    out.write_text('{"question_id": 83, "choices": [{"turns": ["one\u2028two\x85three"]}]}\n', encoding="utf-8")
    assert main(["evaluate", "answers", str(tmp_path), str(questions), str(out)]) == 0
    assert "answers every question already" in capsys.readouterr().out


def test_a_missing_question_file_is_reported_beside_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, out = tmp_path / "question.jsonl", tmp_path / "answers.jsonl"
    out.touch()
    assert main(["evaluate", "answers", str(tmp_path), str(questions), str(out)]) == 1
    assert f"{questions} cannot be read" in capsys.readouterr().err


def test_the_requested_engine_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def load(folder: Path, settings: Settings) -> None:
        found.append(settings.engine)
        raise StarlingError("that is enough")

    monkeypatch.setattr("starling.service.Service.from_folder", load)
    (tmp_path / "question.jsonl").write_text('{"question_id": 83, "turns": ["What?"]}\n')
    command = ["evaluate", "answers", str(tmp_path), str(tmp_path / "question.jsonl"), str(tmp_path / "out.jsonl")]
    for options in ([], ["--engine", "reference"]):
        assert main([*command, *options]) == 1
    assert found == ["engine", "reference"]


@pytest.mark.parametrize(
    ("asked", "out", "fault"),
    [
        ("{}\n", "answers.jsonl", "line 1: not an object with a question_id"),
        ('{"question_id": 83, "turns": "What?"}\n', "answers.jsonl", "question 83: its turns are not a list of texts"),
        ('{"question_id": 83, "turns": ["What?"]}\n', "question.jsonl", "holds the questions: name another"),
        ('{"question_id": 83, "turns": ["What?"]}\n', "absent/answers.jsonl", "cannot be written: No such file"),
    ],
)
def test_errors_in_the_files_are_reported_before_the_model_is_loaded(
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


def test_a_full_disk_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "question.jsonl").write_text('{"question_id": 1, "turns": ["Hi"]}')
    monkeypatch.setattr("starling.evaluate.answers.answer_questions", fill)
    asked = ["evaluate", "answers", str(tmp_path), str(tmp_path / "question.jsonl"), str(tmp_path / "out")]
    monkeypatch.setattr("starling.service.Service.from_folder", lambda *_: io.StringIO())  # anything with close()
    assert main(asked) == 1
    assert "No space left on device" in capsys.readouterr().err
