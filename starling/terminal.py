"""A terminal's face: one answer, or a small chat, streamed from the server.

python -m starling.terminal --url http://127.0.0.1:5000 "What is the capital of France?"
python -m starling.terminal --weights weights/demo          # starts a server for itself; no prompt: a chat
"""

import argparse
import contextlib
import io
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from starling.client import Answer, AnswerError, Client
from starling.errors import StarlingError
from starling.local_server import LocalServer
from starling.settings import Settings
from starling.weights import locate_weights

HINT = "Ctrl-C stops an answer; Ctrl-C or Ctrl-D at the prompt leaves."


def show(client: Client, **inputs: object) -> str:
    """Stream one answer to the terminal, then its metrics. Ctrl-C cancels it. Returns the text that was made."""
    said: list[str] = []
    try:
        with client.stream(**inputs) as answer:
            for chunk in answer:
                said.append(chunk)
                print(chunk, end="", flush=True)
            stopped = answer.status == "canceled"  # by someone else; such an answer has no metrics
            print(f"\n\n{'[stopped]' if stopped else summary(answer)}", flush=True)
    except KeyboardInterrupt:
        print("\n\n[stopped]", flush=True)
    return "".join(said)


def summary(answer: Answer) -> str:
    """The metrics of an answer that has ended, in one line."""
    metrics = answer.metrics
    return (
        f"[{metrics['output_token_count']} tokens at {metrics['tokens_per_second']:.1f}/s, "
        f"first after {metrics['time_to_first_token']:.2f} s · "
        f"prompt {metrics['input_token_count']} tokens, {metrics['cached_token_count']} of them cached · "
        f"ended by {metrics['finish_reason']} · seed {metrics['seed']}]"
    )


def chat(client: Client, **inputs: object) -> None:
    """Turn after turn, until the input ends."""
    print(HINT)
    messages: list[dict[str, str]] = []
    while True:
        try:
            prompt = input("\nYou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not prompt:
            continue
        print("Starling: ", end="", flush=True)
        try:
            text = show(client, prompt=prompt, messages=messages, **inputs)
        except AnswerError as error:
            print(f"\n[{error}]")
            continue
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]


def start(server: LocalServer) -> None:
    """Start a server, telling how long it takes."""
    begun_s = time.monotonic()
    interactive = sys.stderr.isatty()

    def waiting(seconds: float) -> None:
        if interactive:
            print(f"\rStarting the server: {seconds:.1f} s", end="", file=sys.stderr, flush=True)

    server.start(waiting=waiting)
    print(f"{chr(13) if interactive else ''}Server ready in {time.monotonic() - begun_s:.1f} s", file=sys.stderr)


def leave(number: int, frame: FrameType | None) -> None:
    """A signal's handler: end as after an error, so that the server ends too."""
    sys.exit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m starling.terminal", description="Ask the model, or chat with it.")
    parser.add_argument("prompt", nargs="?", help="without one: a chat")
    parser.add_argument("--code", action="store_true", help="use the model's condition for programming")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the server's)")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a running server")
    where.add_argument(
        "--weights", type=Path, help="a checkpoint folder: start a server for it, and stop it at the end"
    )
    parser.add_argument("--engine", choices=("engine", "reference"), help="with --weights; default: STARLING_ENGINE")
    options = parser.parse_args(arguments)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal cannot show, or a byte that is none
    if options.engine and options.url:
        parser.error("--engine goes with --weights: a running server has its engine already")
    inputs: dict[str, object] = {"mode": "code" if options.code else "chat"}
    if options.temperature is not None:
        inputs["temperature"] = options.temperature
    with contextlib.ExitStack() as cleanup:
        try:
            url = options.url
            if url is None:
                environ = {"STARLING_WEIGHTS": str(options.weights.resolve())}
                environ |= {"STARLING_ENGINE": options.engine} if options.engine else {}
                locate_weights(Settings.from_env({**os.environ, **environ}))  # a server would say it among its log
                server = LocalServer(environ=environ)
                for number in (signal.SIGTERM, signal.SIGHUP):  # a window that is closed sends SIGHUP
                    cleanup.callback(signal.signal, number, signal.signal(number, leave))
                cleanup.callback(server.stop)
                start(server)
                url = server.url
            client = Client(url)
            cleanup.callback(client.close)
            if options.prompt is None:
                with contextlib.suppress(ImportError):
                    import readline  # noqa: F401 - input() then edits and recalls lines
                chat(client, **inputs)
            else:
                show(client, prompt=options.prompt, **inputs)
        except StarlingError as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
