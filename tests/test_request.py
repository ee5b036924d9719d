"""What may be asked for: bounds and defaults, stop sequences as people write them, faults in plain words."""

from typing import Any

import pytest

from starling.errors import RequestError
from starling.request import (
    MAX_MESSAGES,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_BYTES,
    MAX_STOP_SEQUENCES,
    MAX_TEXT_BYTES,
    Request,
)

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("", ()),
        (None, ()),
        ("END", ("END",)),
        ("a,b", ("a", "b")),
        ("a, b,", ("a", " b")),
        ("\n\n", ("\n\n",)),
        ('["a,b", "\\n"]', ("a,b", "\n")),
        (' ["a"] ', ("a",)),
        ("[]", ()),
        ("[END]", ("[END]",)),
        (["a"], ("a",)),
    ],
)
def test_stop_sequences(written: Any, meant: tuple[str, ...]) -> None:
    assert Request.parse(prompt="x", stop_sequences=written).stop_sequences == meant


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ["neither prompt nor messages", "Give a prompt"]),
        ({"prompt": "x", "temperature": 5.5}, ["temperature is 5.5", "less than or equal to 5"]),
        ({"prompt": "x", "temperature": float("nan")}, ["temperature", "finite"]),
        ({"prompt": "x", "max_tokens": 0}, ["max_tokens is 0", "greater than or equal to 1"]),
        ({"prompt": "x", "max_tokens": 2.5}, ["max_tokens is 2.5", "integer"]),
        ({"prompt": "x", "min_tokens": 9, "max_tokens": 8}, ["min_tokens is 9", "max_tokens 8", "Lower"]),
        ({"prompt": "x", "seed": -1}, ["seed is -1", "greater than or equal to 0"]),
        ({"prompt": "x", "mode": "poem"}, ["mode", "'chat' or 'code'"]),
        ({"prompt": "x", "unknown": 1}, ["unknown is 1: There is no such input", "Leave"]),
        ({"prompt": "x", "max_token": 1}, ["max_token is 1: There is no such input", "mean max_tokens?"]),
        ({"prompt": "x", "stop_sequences": '["a", "b"'}, ["stop_sequences", "JSON list"]),
        ({"prompt": "x", "stop_sequences": "[" * 100_000 + "]" * 100_000}, ["stop_sequences", "256"]),
        ({"prompt": "x", "stop_sequences": "[1]"}, ["stop_sequences.0", "string"]),
        ({"prompt": "x", "stop_sequences": '[""]'}, ["stop_sequences.0", "at least 1"]),
        (
            {"prompt": "x", "stop_sequences": "a," * (MAX_STOP_SEQUENCES + 1)},
            ["stop_sequences: 17 are given; at most 16", "Drop"],
        ),
        ({"prompt": "x", "prompt_template": "no place"}, ["{prompt}"]),
        ({"prompt": "x", "prompt_template": "{prompt}", "messages": [USER]}, ["prompt_template and messages"]),
        ({"prompt": "x", "prompt_template": "{prompt}", "system_prompt": "s"}, ["{system_prompt}"]),
        ({"messages": [USER], "prompt_template": "{prompt}"}, ["without prompt"]),
        ({"messages": [USER, ASSISTANT]}, ["'assistant'", "user turn"]),
        ({"messages": [SYSTEM]}, ["'system'", "user turn"]),
        ({"prompt": "x", "messages": [USER, SYSTEM]}, ["system turn that is not the first"]),
        ({"prompt": "x", "messages": [SYSTEM], "system_prompt": "s"}, ["Give one of them"]),
        ({"prompt": "x", "messages": [{"role": "bot", "content": "x"}]}, ["messages.0.role", "'assistant'"]),
        ({"prompt": "x", "messages": [{"role": "user"}]}, ["messages.0.content", "required"]),
        ({"prompt": "x", "messages": [USER | {"name": "n"}]}, ["messages.0.name: A message has a role and", "Leave"]),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, ["messages: 1025 are given; at most 1024", "Drop"]),
        ({"prompt": "x" * (MAX_TEXT_BYTES + 1)}, [str(MAX_TEXT_BYTES + 1), str(MAX_TEXT_BYTES), "Shorten"]),
        ({"prompt": "x", "json_schema": "{}", "regex": "a"}, ["json_schema and regex"]),
        ({"prompt": "x", "regex": "ü" * (MAX_REGEX_BYTES // 2 + 1)}, ["regex is longer than 16384 bytes", "Shorten"]),
        ({"prompt": "x", "json_schema": "ü" * (MAX_SCHEMA_BYTES // 2 + 1)}, ["longer than 65536 bytes", "Shorten"]),
        ({"prompt": "x", "max_tokens": 5, "max_new_tokens": "secret"}, ["max_tokens: ", "integer"]),
        ({"prompt": "x", "max_tokens": 5, "max_new_tokens": "\ud800"}, ["max_tokens: ", "valid"]),
    ],
)
def test_faults_say_the_value_the_rule_and_the_remedy(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        Request.parse(**fields)
    for word in words:
        assert word in str(caught.value)


def test_the_bytes_of_all_texts_are_counted_together() -> None:
    quarter = MAX_TEXT_BYTES // 4
    user, assistant = ({"role": role, "content": "x" * quarter} for role in ("user", "assistant"))
    whole = {"prompt": "ü" * (quarter // 2), "system_prompt": "x" * quarter, "messages": [user, assistant]}
    templated = {"prompt": "ü" * quarter, "prompt_template": "{prompt}" + "x" * (2 * quarter - len("{prompt}"))}
    for texts in (whole, templated):
        Request.parse(**texts)
        with pytest.raises(RequestError, match=f"hold {MAX_TEXT_BYTES + 1} bytes together"):
            Request.parse(**{**texts, "prompt": f"{texts['prompt']}x"})


def test_a_template_s_values_are_counted_at_every_use() -> None:
    template = "{prompt}" * 1000 + "{system_prompt}" * 1000
    fits = (MAX_TEXT_BYTES - len(template)) // 2000
    Request.parse(prompt="x" * fits, system_prompt="y" * fits, prompt_template=template)
    for longer in ({"prompt": "x" * 2 * fits}, {"system_prompt": "y" * 2 * fits}):
        with pytest.raises(RequestError, match="counting every use in the template"):
            Request.parse(**{"prompt": "x" * fits, "system_prompt": "y" * fits, **longer}, prompt_template=template)


def test_a_blank_text_counts_as_not_given_except_in_stop_sequences() -> None:
    blank = dict.fromkeys(("prompt", "system_prompt", "prompt_template", "json_schema", "regex", "mode"), " \n")
    request = Request.parse(messages=[USER], stop_sequences=" ", **blank)
    assert request == Request.parse(messages=[USER], stop_sequences=[" "])
    with pytest.raises(RequestError, match="neither prompt nor messages"):
        Request.parse(prompt=" ")


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        Request.parse(prompt="x", temperature=9, top_p=2, seed=-5)
    assert all(name in str(caught.value) for name in ("temperature is 9", "top_p is 2", "seed is -5"))


def test_a_fault_never_quotes_the_prompt() -> None:
    with pytest.raises(RequestError) as caught:
        Request.parse(prompt="my secret", system_prompt=["my secret"], messages=[{"role": "my secret"}], temperature=9)
    assert "my secret" not in str(caught.value)


def test_whole_floats_are_integers_and_seed_zero_counts() -> None:
    request = Request.parse(prompt="x", max_tokens=3.0, seed=0.0)
    assert (request.max_tokens, request.seed) == (3, 0)
