"""Prompts, id for id, against golden lists from the model card and OpenChat's own tests."""

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.chat import Chat, ReplyStart
from starling.request import Message, Request
from starling.tokenizer import Tokenizer
from starling.tokenizer_json import starling_tokenizer

BOS, END_OF_TURN = 1, 32000


@cache
def chat() -> Chat:
    return Chat(Tokenizer(starling_tokenizer(), 32002), BOS, END_OF_TURN)


def ids(**request: Any) -> list[int]:
    return chat().prompt_ids(Request.parse(**request))


# fmt: off
HELLO = [1, 420, 6316, 28781, 3198, 3123, 1247, 28747, 22557, 32000, 420, 6316, 28781, 3198, 3123, 21631, 28747]
HELLO_HI_HOW = [
    1, 420, 6316, 28781, 3198, 3123, 1247, 28747, 22557, 32000, 420, 6316, 28781, 3198, 3123, 21631, 28747, 15359,
    32000, 420, 6316, 28781, 3198, 3123, 1247, 28747, 1602, 460, 368, 3154, 28804, 32000, 420, 6316, 28781, 3198,
    3123, 21631, 28747,
]
QUICKSORT = [1, 7596, 1247, 28747, 26256, 2936, 7653, 1413, 334, 1680, 32000, 7596, 21631, 28747]
SYSTEM_HI = [
    1, 995, 460, 264, 10865, 13892, 28723, 32000, 420, 6316, 28781, 3198, 3123, 1247, 28747, 15359, 32000, 420, 6316,
    28781, 3198, 3123, 21631, 28747,
]
# fmt: on
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
SYSTEM = "You are a helpful assistant."


@pytest.mark.parametrize(
    ("request_fields", "golden"),
    [
        ({"prompt": "Hello"}, HELLO),
        ({"messages": TURNS[:1]}, HELLO),
        ({"messages": TURNS, "prompt": "How are you today?"}, HELLO_HI_HOW),
        ({"messages": [*TURNS, {"role": "user", "content": "How are you today?"}]}, HELLO_HI_HOW),
        ({"prompt": "Implement quicksort using C++", "mode": "code"}, QUICKSORT),
        ({"prompt": "Hi", "system_prompt": SYSTEM}, SYSTEM_HI),
        ({"prompt": "Hi", "messages": [{"role": "system", "content": SYSTEM}]}, SYSTEM_HI),
    ],
)
def test_golden_ids(request_fields: dict[str, Any], golden: list[int]) -> None:
    assert ids(**request_fields) == golden


@pytest.mark.parametrize(
    ("request_fields", "golden"),
    [
        (
            {"prompt": "Hello", "prompt_template": "GPT4 Correct User: {prompt}<|end_of_turn|>GPT4 Correct Assistant:"},
            HELLO,
        ),
        (
            {
                "prompt": "Hi",
                "system_prompt": SYSTEM,
                "prompt_template": "<s>{system_prompt}<|end_of_turn|>GPT4 Correct User: {prompt}<|end_of_turn|>"
                "GPT4 Correct Assistant:",
            },
            SYSTEM_HI,
        ),
    ],
)
def test_an_equivalent_template_gives_the_same_ids(request_fields: dict[str, Any], golden: list[int]) -> None:
    assert ids(**request_fields) == golden


def test_template_values_are_inserted_literally_and_once() -> None:
    braces = "{0} {prompt} {system_prompt} {x!r} %s {{}}"
    template = "{system_prompt}|{prompt}|{other} {{prompt}}"
    built = ids(prompt=braces, system_prompt=braces, prompt_template=template)
    text = chat()._tokenizer.decode(built)  # type: ignore[attr-defined]
    assert text == f" {braces}|{braces}|{{other}} {{{braces}}}"


def test_only_a_template_s_first_beginning_of_text_counts() -> None:
    built = ids(prompt="Hi", prompt_template="<s><s>{prompt}<|end_of_turn|>")
    assert [built.count(BOS), built[-1]] == [1, END_OF_TURN]
    assert chat()._tokenizer.decode(built) == " <s>Hi"  # type: ignore[attr-defined]


HOSTILE = ("<|end_of_turn|>", "<s>", "</s>", "<unk>", "<|pad_0|>", "<0x0A>", "GPT4 Correct Assistant:", "▁")


@given(st.lists(st.sampled_from(HOSTILE) | st.text(max_size=8), min_size=1, max_size=6).map("".join).filter(str.strip))
def test_text_never_becomes_a_control_token(text: str) -> None:
    controls = {0, 1, 2, 32000, 32001}

    def count(**fields: Any) -> int:
        return sum(token in controls for token in ids(**fields))

    assert count(prompt=text) == 3 - 1  # <s> and one end of turn
    assert count(prompt=text, system_prompt=text, messages=[{"role": "user", "content": text}]) == 4
    assert count(prompt=text, prompt_template="a<|end_of_turn|>{prompt}<|end_of_turn|>b") == 3


@given(st.lists(st.text(" a\n", max_size=3), max_size=5))
def test_only_the_one_space_before_the_answer_is_dropped(pieces: list[str]) -> None:
    stage = ReplyStart()
    shown = "".join(stage.feed(piece) for piece in pieces)
    assert shown == "".join(pieces).removeprefix(" ")


def test_messages_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Message(role="user", content="x").content = "y"  # type: ignore[misc]
