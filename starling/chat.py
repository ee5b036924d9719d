"""A conversation → token ids, exactly as the model was trained (OpenChat 3.5's format, used unchanged by Starling).

    <s> [system<|end_of_turn|>] GPT4 Correct User: text<|end_of_turn|> GPT4 Correct Assistant:

without the spaces between the parts. Code mode uses `Code User` and `Code Assistant`. Each piece of text is encoded
separately and control tokens are inserted by id, so no text can turn into one.
"""

import re
from collections.abc import Iterable
from typing import Protocol

from starling.request import Message, Request

END_OF_TURN = "<|end_of_turn|>"
BEGIN = "<s>"
CONDITIONS = {"chat": "GPT4 Correct", "code": "Code"}
_PLACEHOLDER = re.compile(r"\{(prompt|system_prompt)\}")


class TextEncoder(Protocol):
    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without any control token."""
        ...


class Chat:
    """Builds prompts for one tokenizer. `bos` opens every prompt; `end_of_turn` closes every turn."""

    def __init__(self, tokenizer: TextEncoder, bos: int, end_of_turn: int) -> None:
        self._tokenizer = tokenizer
        self._bos = bos
        self._end_of_turn = end_of_turn

    def prompt_ids(self, request: Request) -> list[int]:
        """The prompt of one request, ready for the model's reply."""
        if request.prompt_template is not None:
            return self._from_template(request.prompt_template, request)
        return self._from_turns(self._turns(request), CONDITIONS[request.mode])

    def _turns(self, request: Request) -> Iterable[Message]:
        if request.system_prompt:
            yield Message(role="system", content=request.system_prompt)
        yield from request.messages
        if request.prompt:
            yield Message(role="user", content=request.prompt)

    def _from_turns(self, turns: Iterable[Message], condition: str) -> list[int]:
        ids = [self._bos]
        for turn in turns:
            # A system message is bare text: the model never saw a label before it.
            label = "" if turn.role == "system" else f"{condition} {turn.role.title()}: "
            ids += [*self._tokenizer.encode(label + turn.content), self._end_of_turn]
        return ids + self._tokenizer.encode(f"{condition} Assistant:")

    def _from_template(self, template: str, request: Request) -> list[int]:
        """The caller's own format. Control tokens are recognised in the template, but not in the values."""
        values = {"prompt": request.prompt, "system_prompt": request.system_prompt}
        pieces = template.removeprefix(BEGIN).split(END_OF_TURN)
        ids = [self._bos]
        for index, piece in enumerate(pieces):
            text = _PLACEHOLDER.sub(lambda found: values[found[1]], piece)
            ids += [self._end_of_turn] if index else []
            ids += self._tokenizer.encode(text)
        return ids


class ReplyStart:
    """A stage of the stream: drops the one space that the model puts between `Assistant:` and its answer."""

    def __init__(self) -> None:
        self._begun = False

    def feed(self, text: str) -> str:
        if self._begun or not text:
            return text
        self._begun = True
        return text.removeprefix(" ")
