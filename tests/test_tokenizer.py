"""Text ↔ ids: SentencePiece as the oracle, and text cut anywhere. The golden lists are in test_chat.py."""

import copy
import importlib.util
import json
import threading
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from starling import tokenizer_json
from starling.errors import CheckpointError, RequestError
from starling.tokenizer import IncrementalDecoder, Tokenizer, byte_alphabet

STARLING_VOCAB = 32002
END_OF_TURN = "<|end_of_turn|>"


@cache
def starling_json() -> dict[str, Any]:
    return tokenizer_json.starling_tokenizer()


@cache
def starling() -> Tokenizer:
    return Tokenizer(copy.deepcopy(starling_json()), STARLING_VOCAB)


@cache
def byte_level() -> Tokenizer:
    """Bytes, a few merges (one of which would spell a control token), two control tokens, three unused rows."""
    letters = byte_alphabet()
    merges = [["h", "e"], ["Ġ", "he"], ["Ã", "©"], ["<", "s>"], ["s", ">"]]
    vocab = letters | {"he": 256, "Ġhe": 257, "Ã©": 258, "s>": 259, "<s>": 260}
    return Tokenizer(tokenizer_json.byte_level(vocab, merges, {"<s>": 260, END_OF_TURN: 261}), 265)


@cache
def sentencepiece() -> SentencePieceProcessor:
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None
    return SentencePieceProcessor(model_file=str(Path(spec.origin).parent / "data" / "tokenizer.model.v1"))


both = pytest.mark.parametrize("tokenizer", [starling(), byte_level()], ids=["sentencepiece", "byte-level"])
text = st.text(st.characters(exclude_categories=["Cs"]))
prose = st.lists(
    st.sampled_from(
        ["the", " ", "  ", "\n", "\n    ", "def", "x1", "2024", "é", "日本", "🦜", "\t", "<s>", "▁", "\x00"]
    )
).map("".join)


@given(text | prose)
def test_encodes_as_sentencepiece_does(text: str) -> None:
    assert starling().encode(text) == sentencepiece().encode(text)


@both
@given(text=text | prose)
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    decoded = tokenizer.decode(tokenizer.encode(text))
    if tokenizer is starling():  # SentencePiece puts a space before a text and writes spaces as ▁
        assert decoded == (" " + text.replace("▁", " ") if text else "")
    else:
        assert decoded == text


@both
@given(st.lists(st.sampled_from([END_OF_TURN, "<s>", "</s>", "<unk>", "<|pad_0|>", "<0x0A>", "<", "s>", " ", "a"])))
def test_no_text_becomes_a_control_token(tokenizer: Tokenizer, parts: list[str]) -> None:
    ids = tokenizer.encode("".join(parts))
    assert all(tokenizer.token_bytes(id) for id in ids)
    assert tokenizer.token_id(END_OF_TURN) not in ids
    assert tokenizer.token_id("<s>") not in ids


@both
@given(data=st.data())
def test_streamed_text_equals_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    encoded = st.builds(tokenizer.encode, text | prose)
    anything = st.lists(st.integers(0, tokenizer.vocab_size - 1))
    some_bytes = st.lists(st.sampled_from([i for i in range(260) if len(tokenizer.token_bytes(i)) == 1]))
    tokens = [*chain.from_iterable(data.draw(st.lists(encoded | anything | some_bytes, max_size=4)))]
    decoder = IncrementalDecoder(tokenizer)
    parts = [decoder.feed(token) for token in tokens] + [decoder.flush()]
    whole = b"".join(tokenizer.token_bytes(token) for token in tokens).decode("utf-8", errors="replace")
    assert "".join(parts) == whole == tokenizer.decode(tokens)


def test_a_character_waits_for_its_last_byte_and_a_truncated_one_is_marked() -> None:
    tokenizer = starling()
    bird = [tokenizer.encode("🦜")[-4 + i] for i in range(4)]
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.feed(token) for token in bird] == ["", "", "", "🦜"]
    assert [decoder.feed(token) for token in bird[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd"


def test_the_byte_table_agrees_with_sentencepiece() -> None:
    tokenizer, oracle = starling(), sentencepiece()
    for id in range(oracle.get_piece_size()):
        if oracle.is_control(id) or oracle.is_unknown(id):
            assert tokenizer.token_bytes(id) == b""
        elif oracle.is_byte(id):
            assert tokenizer.token_bytes(id) == bytes([id - oracle.piece_to_id("<0x00>")])
        else:
            assert tokenizer.token_bytes(id).decode() == oracle.id_to_piece(id).replace("▁", " ")
    assert tokenizer.token_bytes(32000) == tokenizer.token_bytes(32001) == b""


def test_merges_may_be_written_as_one_text() -> None:
    """As in older files; those that would produce a control token are still left out."""
    vocab = byte_alphabet() | {"he": 256, "<|": 257, "<|>": 258}
    old = tokenizer_json.byte_level(vocab, ["h e", "< |", "<| >"], {"<|>": 258})  # type: ignore[list-item]
    assert Tokenizer(old, 259).encode("he<|>") == [256, 257, vocab[">"]]


def test_rows_without_a_token_add_nothing() -> None:
    assert [byte_level().token_bytes(id) for id in (260, 262, 264)] == [b"", b"", b""]


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        starling().encode("a\ud83ea")


def test_a_long_text_leaves_other_threads_running() -> None:
    turns, done = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not done.wait(0.001):
            turns += 1

    counting = threading.Thread(target=count)
    counting.start()
    try:
        text = "Grüße an alle, transformers! " * 20_000
        tokenizer = starling()
        before = turns
        tokenizer.encode(text)
        assert turns - before > 10  # with the GIL held, one at most
    finally:
        done.set()
        counting.join()


def test_a_control_token_beyond_the_embedding_table_is_refused() -> None:
    raw = copy.deepcopy(starling_json())
    raw["added_tokens"].append({**raw["added_tokens"][-1], "id": 32002, "content": "<sep>"})
    tokenizer = Tokenizer(raw, STARLING_VOCAB)
    with pytest.raises(CheckpointError, match=r"'<sep>' the id 32002, outside the embedding table of 32002"):
        tokenizer.token_id("<sep>")
    assert 32002 not in tokenizer.encode("<sep>")
    with pytest.raises(CheckpointError, match="no token '<nothing>'"):
        tokenizer.token_id("<nothing>")


@pytest.mark.parametrize("rows", [31000, 31999])
def test_a_vocabulary_larger_than_the_embedding_table_is_refused(rows: int) -> None:
    with pytest.raises(CheckpointError, match=f"token id 31999, but the embedding table has {rows} rows"):
        Tokenizer(copy.deepcopy(starling_json()), rows)


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    unigram = copy.deepcopy(starling_json()) | {"model": {"type": "Unigram", "vocab": [], "merges": []}}
    with pytest.raises(CheckpointError, match="of type 'Unigram', ignore_merges False; implemented: 'BPE'"):
        Tokenizer(unigram, STARLING_VOCAB)
    unmerged = copy.deepcopy(starling_json())
    unmerged["model"]["ignore_merges"] = True
    with pytest.raises(CheckpointError, match="of type 'BPE', ignore_merges True"):
        Tokenizer(unmerged, STARLING_VOCAB)
    undecodable = copy.deepcopy(starling_json()) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer(undecodable, STARLING_VOCAB)


def test_files_at_fault_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path, STARLING_VOCAB)
    path = tmp_path / "tokenizer.json"
    whole = json.dumps(starling_json())
    for broken, message in [
        (whole[: len(whole) // 2], "cannot be read as JSON"),
        ("{}", "not a complete tokenizer.json"),
        ("[]", "holds a list, not an object"),
        (json.dumps(starling_json() | {"normalizer": {"type": "Nonsense"}}), "cannot be read"),
    ]:
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_folder(tmp_path, STARLING_VOCAB)
    tokenizer_json.write(starling_json(), tmp_path)
    assert Tokenizer.from_folder(tmp_path, STARLING_VOCAB).encode("Hello") == starling().encode("Hello")
