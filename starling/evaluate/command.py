"""`python -m starling evaluate text|answers`. Imports wait for the run: that of transformers takes seconds."""

import argparse
import logging
import os
from contextlib import closing
from pathlib import Path

from starling import text_file
from starling.errors import NotInstalledError


def add_evaluate_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    what = "perplexity, distance from the unquantized model, answers for a judge"
    evaluate = subparsers.add_parser("evaluate", help=what, description=what)
    actions = evaluate.add_subparsers(dest="action", required=True, metavar="text|answers")
    what = "perplexity; with --source also KL divergence and top-1 agreement"
    text = actions.add_parser("text", help=what, description=what)
    text.add_argument("weights", type=Path, metavar="WEIGHTS", help="a checkpoint folder, AWQ or full precision")
    text.add_argument("text", type=Path, metavar="TEXT", help="a text file in UTF-8")
    text.add_argument("--source", type=Path, help="the full-precision checkpoint that WEIGHTS was made from")
    text.add_argument("--window", type=int, default=512, help="tokens of context (default: %(default)s)")
    text.add_argument("--max-tokens", type=int, help="use at most this many tokens of the text")
    text.set_defaults(run=_evaluate_text)
    what = "answer multi-turn questions through the service, in MT-bench's format; the same command resumes"
    answers = actions.add_parser("answers", help=what, description=what)
    answers.add_argument("weights", type=Path, metavar="WEIGHTS", help="an AWQ checkpoint folder")
    answers.add_argument(
        "questions", type=Path, metavar="QUESTIONS", help="MT-bench's question.jsonl, or a file like it"
    )
    answers.add_argument(
        "out", type=Path, metavar="OUT", help="answers are appended here; questions that have one are skipped"
    )
    answers.add_argument("--engine", choices=("engine", "reference"), help="default: STARLING_ENGINE")
    answers.add_argument("--model-id", help="what the judge calls the model (default: the name of WEIGHTS)")
    answers.add_argument("--max-tokens", type=int, default=1024, help="per answer (default: %(default)s)")
    answers.set_defaults(run=_evaluate_answers, stopped_note="The same command resumes after the last answer.")


def _evaluate_text(args: argparse.Namespace) -> int:
    try:
        from starling.evaluate.text import evaluate_text
    except ImportError as error:
        raise NotInstalledError(error) from error
    quality = evaluate_text(args.weights, text_file.read(args.text), args.source, args.window, args.max_tokens)
    print(f"tokens             {quality.tokens}")
    print(f"perplexity         {quality.perplexity:.4f}")
    if quality.source_perplexity is not None:
        print(f"source perplexity  {quality.source_perplexity:.4f}")
        print(f"mean KL            {quality.kl_divergence:.5f} nats per token")
        print(f"top-1 agreement    {quality.top1_agreement:.2%}")
    return 0


def _evaluate_answers(args: argparse.Namespace) -> int:
    from starling.evaluate.answers import answer_questions, appending, unanswered
    from starling.service import Service
    from starling.settings import Settings

    settings = Settings.from_env(os.environ)
    settings = settings.model_copy(update={"engine": args.engine} if args.engine else {})
    questions = unanswered(args.questions, args.out)  # files first: loading the model takes longer
    if not questions:
        print(f"{args.out} answers every question already.")
        return 0
    model_id = args.model_id or args.weights.resolve().name
    logging.getLogger("starling.service").setLevel(logging.WARNING)  # its log lines would break up the progress bar
    with appending(args.out) as out, closing(Service.from_folder(args.weights, settings)) as service:
        answer_questions(service, model_id, questions, out, args.max_tokens)
    print(f"Answered {len(questions)} questions, in {args.out}")
    return 0
