"""What a caller may ask for. The single source of bounds and defaults."""

import difflib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from starling.errors import RequestError

MAX_TOKENS = 8192  # the model's context, in tokens
MAX_SEED = 2**32 - 1
# More than this is more text than 8,192 tokens can hold, and is refused before it costs any work.
MAX_TEXT_BYTES = 1 << 20
MAX_MESSAGES = 1024
MAX_STOP_SEQUENCES = 16
MAX_STOP_SEQUENCE_CHARS = 256
MAX_SCHEMA_BYTES = 64 << 10
MAX_REGEX_BYTES = 16 << 10  # compile time grows with the square of the length: a second at most
OLD_NAMES = {"max_new_tokens": "max_tokens"}


class Message(BaseModel):
    """One earlier turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


def parse_stop_sequences(value: Any) -> Any:
    """A JSON list of strings, comma-separated text (spaces count) or a list → a list."""
    if value is None:
        return []
    if not isinstance(value, str):
        return value
    text = value.strip()
    if (text.startswith("[") and text.endswith("]")) or text.startswith('["'):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            if text.startswith('["'):
                raise ValueError(f'is not a JSON list of strings ({error}); write ["first", "second"]') from error
    return [part for part in value.split(",") if part]


StopSequence = Annotated[str, Field(min_length=1, max_length=MAX_STOP_SEQUENCE_CHARS)]


class Request(BaseModel):
    """One request for text, checked. Frozen: nothing edits it later."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str = ""
    system_prompt: str = ""
    messages: Annotated[tuple[Message, ...], Field(max_length=MAX_MESSAGES)] = ()
    mode: Literal["chat", "code"] = "chat"
    max_tokens: int = Field(512, ge=1, le=MAX_TOKENS)
    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS)
    temperature: float = Field(0.7, ge=0, le=5)  # 0 is greedy
    top_p: float = Field(0.95, ge=0, le=1)  # 0 keeps only the likeliest token
    top_k: int = Field(0, ge=-1)  # 0 and -1 mean off
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    stop_sequences: Annotated[
        tuple[StopSequence, ...], Field(max_length=MAX_STOP_SEQUENCES), BeforeValidator(parse_stop_sequences)
    ] = ()
    seed: int | None = Field(None, ge=0, le=MAX_SEED)  # None: drawn at random, and reported
    prompt_template: str | None = None
    json_schema: str | None = None
    regex: str | None = None

    @classmethod
    def parse(cls, **fields: Any) -> "Request":
        """Check a caller's fields. Raises RequestError naming every fault: the value, the rule, the remedy."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise RequestError("; ".join(_fault(e) for e in error.errors(include_url=False))) from None

    @model_validator(mode="before")
    @classmethod
    def _as_given(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Treat blank texts as not given, except in stop_sequences, where spaces count. Map old names to new ones."""
        given = {
            name: value
            for name, value in fields.items()
            if name == "stop_sequences" or not isinstance(value, str) or value.strip()
        }
        for old, name in OLD_NAMES.items():
            value = given.pop(old, None)
            if value is None:
                continue
            default = cls.model_fields[name].default  # Cog's form sends it when nothing is given
            both = (given.get(name, default), value)
            if all(isinstance(each, int) for each in both) and both[0] not in (value, default):
                raise ValueError(f"{name} is {both[0]} and {old}, its old name, is {value}. Give one of them")
            given[name] = value
        return given

    @model_validator(mode="after")
    def _consistent(self) -> "Request":
        template = self.prompt_template or ""
        text_bytes = (
            byte_count(self.prompt) * max(1, template.count("{prompt}"))
            + byte_count(self.system_prompt) * max(1, template.count("{system_prompt}"))
            + byte_count(template)
            + sum(byte_count(message.content) for message in self.messages)
        )
        if text_bytes > MAX_TEXT_BYTES:
            repeats = ", counting every use in the template" if template else ""
            raise ValueError(
                f"prompt, system_prompt, messages and prompt_template hold {text_bytes} bytes together{repeats}; "
                f"at most {MAX_TEXT_BYTES} are accepted. Shorten them"
            )
        for name, most in (("json_schema", MAX_SCHEMA_BYTES), ("regex", MAX_REGEX_BYTES)):
            grammar = getattr(self, name)
            if grammar is not None and byte_count(grammar) > most:
                raise ValueError(f"{name} is longer than {most} bytes. Shorten it")
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("json_schema and regex are both given; an answer can follow only one. Drop one")
        if not self.prompt and not self.messages:
            raise ValueError(
                "neither prompt nor messages is given. Give a prompt, or messages that end with a user turn; over HTTP "
                'inside of "input" and spelled like this (other names are ignored), with Content-Type: application/json'
            )
        if self.messages and not self.prompt and self.messages[-1].role != "user":
            raise ValueError(
                f"messages end with a turn of role {self.messages[-1].role!r} and prompt is empty. "
                "End with a user turn, or give the next one as prompt"
            )
        if any(message.role == "system" for message in self.messages[1:]):
            raise ValueError("messages have a system turn that is not the first. Put it first, or use system_prompt")
        if self.system_prompt and self.messages and self.messages[0].role == "system":
            raise ValueError("system_prompt is given and messages begin with a system turn. Give one of them")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}. Lower it, or raise max_tokens"
            )
        if self.prompt_template is not None:
            self._check_template(self.prompt_template)
        return self

    def _check_template(self, template: str) -> None:
        if "{prompt}" not in template:
            raise ValueError("prompt_template does not contain {prompt}. Put {prompt} where the prompt goes")
        if not self.prompt:
            raise ValueError("prompt_template is given without prompt. Give the prompt that it wraps")
        if self.messages:
            raise ValueError("prompt_template and messages are both given; a template wraps one prompt. Drop one")
        if self.system_prompt and "{system_prompt}" not in template:
            raise ValueError("system_prompt is given, but prompt_template has no {system_prompt}. Add it, or drop one")


def byte_count(text: str) -> int:
    """Bytes in UTF-8; lone surrogates count too."""
    return len(text.encode("utf-8", errors="surrogatepass"))


def _fault(error: Any) -> str:
    """One pydantic error in our words. Only numbers and booleans are quoted: text may be a prompt."""
    where = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "too_long":  # of a list; pydantic's own message would call it a tuple
        message = "{actual_length} are given; at most {max_length} are accepted. Drop some".format(**error["ctx"])
    elif error["type"] == "extra_forbidden" and len(error["loc"]) > 1:
        message = "A message has a role and content, nothing else. Leave it out"
    elif error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(where, (*Request.model_fields, *OLD_NAMES), 1)
        message = f"There is no such input. {f'Did you mean {near[0]}?' if near else 'Leave it out'}"
    value = error.get("input")
    shown = f" is {value!r}:" if isinstance(value, int | float | bool) and where else ""
    return f"{where}{shown or ':'} {message}" if where else message
