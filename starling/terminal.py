"""A terminal client: one answer, or a simple chat, streamed from the server. The answer goes to standard output, its
metrics and errors to standard error.

python -m starling.terminal --url http://127.0.0.1:5000 "What is the capital of France?"
python -m starling.terminal --weights weights/demo          # starts its own server; no prompt: a chat
python -m starling.terminal --weights weights/demo < FILE   # the file is the prompt
python -m starling.terminal --weights weights/demo -i max_tokens=2000 -i system_prompt="Answer in French." "Hello"
"""

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from starling.client import Answer, AnswerError, Client
from starling.errors import NoRoomError, StarlingError
from starling.local_server import LocalServer
from starling.request import OLD_NAMES, Request
from starling.settings import Settings
from starling.weights import locate_weights

Turn = dict[str, str]
NUMBERS = {name for name, field in Request.model_fields.items() if field.annotation in (int, float, int | None)}
HINT = "Ctrl-C stops an answer; at the prompt, Ctrl-C or Ctrl-D quits."


def show(client: Client, **inputs: object) -> str:
    """Stream one answer to the output, then show its metrics. Ctrl-C cancels it. Returns the generated text."""
    chunks: list[str] = []
    try:
        with client.stream(**inputs) as answer:
            for chunk in answer:
                chunks.append(chunk)
                print(chunk, end="", flush=True)
            stopped = answer.status == "canceled"  # by another client; such an answer has no metrics
            end = "[stopped]" if stopped else summary(answer)
    except KeyboardInterrupt:
        end = "[stopped]"
    print(flush=True)
    print(f"\n{end}", file=sys.stderr, flush=True)
    return "".join(chunks)


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
    """One turn after another, until the input ends."""
    print(HINT)
    messages: list[Turn] = []
    while True:
        try:
            prompt = input("\nYou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not prompt:
            continue
        try:
            messages = take_turn(client, messages, prompt, **inputs)
        except AnswerError as error:
            print(f"\n[{error}]")


def take_turn(client: Client, messages: list[Turn], prompt: str, **inputs: object) -> list[Turn]:
    """Show the answer to a chat's next prompt. Returns the turns to continue with, this one added if answered."""
    print("Starling: ", end="", flush=True)
    shortened = False
    while True:
        try:
            text = show(client, prompt=prompt, messages=messages, **inputs)
            break
        except AnswerError as error:
            if not messages or error.kind != NoRoomError.__name__:
                raise
        if not shortened:
            print("[the chat has grown too long: its older part is left out]\nStarling: ", end="", flush=True)
        shortened = True
        # Half at once: what is kept must be prefilled again, and dropping single turns would cost that at every prompt.
        messages = messages[max(2, len(messages) // 4 * 2) :]
    turn = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return messages + turn if text else messages


def start(server: LocalServer) -> None:
    """Start the server, showing how long it takes."""
    began_s = time.monotonic()
    interactive = sys.stderr.isatty()

    def waiting(seconds: float) -> None:
        if interactive:
            print(f"\rStarting the server: {seconds:.1f} s", end="", file=sys.stderr, flush=True)

    server.start(waiting=waiting)
    erase = "\r\x1b[K" if interactive else ""  # the line that counts the seconds, which is longer
    print(f"{erase}Server ready in {time.monotonic() - began_s:.1f} s", file=sys.stderr)


def leave(number: int, frame: FrameType | None) -> None:
    """Signal handler: exit through an exception, so that the clean-up stops the server too."""
    sys.exit(128 + number)


def discard_output() -> None:
    """Redirect stdout to /dev/null: flushing what is still buffered would fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def named_input(text: str) -> tuple[str, object]:
    """NAME=VALUE → name and value: a number where the server wants one, else text. Request validates both."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} has no =: write NAME=VALUE")
    if name in ("prompt", "messages"):
        remedy = "it is what you type" if name == "prompt" else "chat, or send them over HTTP"
        raise argparse.ArgumentTypeError(f"{name} cannot be set with -i: {remedy}")
    if OLD_NAMES.get(name, name) not in NUMBERS:
        return name, value
    if not value.strip():
        raise argparse.ArgumentTypeError(f"{name} is blank: give a number, or leave it out")
    with contextlib.suppress(ValueError):
        return name, json.loads(value)
    return name, value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m starling.terminal", description="Ask the model, or chat with it.")
    parser.add_argument("prompt", nargs="*", help="in quotes; without one: what is piped in, or else a chat")
    parser.add_argument("--code", action="store_true", help="use the model's mode for programming")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the server's)")
    parser.add_argument(
        "-i", "--input", action="append", default=[], type=named_input, metavar="NAME=VALUE", dest="inputs",
        help="any other input, such as max_tokens=2000 or system_prompt='Be brief.'; may be repeated",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="the address of a running server")
    where.add_argument("--weights", type=Path, help="a checkpoint folder: start a server for it, stop it at the end")
    parser.add_argument("--engine", choices=("engine", "reference"), help="for --weights (default: STARLING_ENGINE)")
    options = parser.parse_args(arguments)
    if options.engine and options.url:
        parser.error("--engine goes with --weights: a running server already has its engine")
    if len(options.prompt) > 1:
        parser.error("the prompt is one argument: put it in quotes")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal cannot show, bytes that are not text
    prompt: str | None = options.prompt[0] if options.prompt else None
    inputs: dict[str, object] = {"mode": "code" if options.code else "chat"}
    if options.temperature is not None:
        inputs["temperature"] = options.temperature
    inputs |= dict(options.inputs)
    try:
        if prompt is None and not sys.stdin.isatty():
            prompt = sys.stdin.read().strip()
        if prompt is not None and not prompt.strip():
            raise StarlingError("The prompt is empty. Give one, or none at all for a chat.")
        Request.parse(prompt="Hello" if prompt is None else prompt, **inputs)  # validated before a server is started
        with contextlib.ExitStack() as cleanup:
            url = options.url
            if url is None:
                if not options.weights.is_dir():
                    raise StarlingError(f"--weights names {str(options.weights)!r}, which is not a folder.")
                environ = {"STARLING_WEIGHTS": str(options.weights.resolve())}
                environ |= {"STARLING_ENGINE": options.engine} if options.engine else {}
                locate_weights(Settings.from_env({**os.environ, **environ}))  # its error here, not in a server's log
                server = LocalServer(environ=environ)
                for number in (signal.SIGTERM, signal.SIGHUP):  # closing the window sends SIGHUP
                    cleanup.callback(signal.signal, number, signal.signal(number, leave))
                cleanup.callback(server.stop)
                start(server)
                url = server.url
            client = cleanup.enter_context(contextlib.closing(Client(url)))
            if prompt is None:
                with contextlib.suppress(ImportError):
                    import readline  # noqa: F401 - input() then edits and recalls lines
                chat(client, **inputs)
            else:
                show(client, prompt=prompt, **inputs)
    except BrokenPipeError:  # the reader, `head` say, has closed the output
        discard_output()
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk under the output, say
        discard_output()
        print(f"\n{error}", file=sys.stderr)
        return 1
    except StarlingError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
