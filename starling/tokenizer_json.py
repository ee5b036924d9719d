"""Builds tokenizer.json files for checkpoints that lack one: from a tokenizer.model, or from pieces.

Serving does not need this; the demo model, the benchmarks and the tests do.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from starling.errors import PYTHON, WeightsError

CONTROL_TOKENS = ("<|end_of_turn|>", "<|pad_0|>")  # what Starling's checkpoint adds to Mistral's vocabulary


def starling_tokenizer() -> dict[str, Any]:
    """The tokenizer.json of Starling-LM-7B-alpha, made from the tokenizer.model that mistral-common ships.

    That file is byte-identical to the checkpoint's own. Raises WeightsError if the package is not installed.
    """
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        raise WeightsError(f"mistral-common is not installed. Run: {PYTHON} -m pip install --no-deps mistral-common")
    return from_sentencepiece(Path(spec.origin).parent / "data" / "tokenizer.model.v1", CONTROL_TOKENS)


def from_sentencepiece(path: Path, control_tokens: tuple[str, ...] = ()) -> dict[str, Any]:
    """A SentencePiece BPE model with byte fallback → a tokenizer.json that encodes identically.

    `control_tokens` get the ids after the model's own pieces.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(path))
    size = model.get_piece_size()
    pieces = [model.id_to_piece(i) for i in range(size)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # SentencePiece merges the neighbours whose product scores best, however that splits. So every split becomes a
    # merge, in the order of the products' scores.
    mergeable = [i for i in range(size) if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    merges: list[list[str]] = []
    for i in sorted(mergeable, key=lambda i: -model.get_score(i)):
        piece = pieces[i]
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [split for split in splits if split[0] in vocab and split[1] in vocab]
        merges += [list(split) for split in sorted(known, key=lambda split: (vocab[split[0]], vocab[split[1]]))]
    controls = {pieces[i]: i for i in range(size) if model.is_control(i) or model.is_unknown(i)}
    controls |= {token: size + i for i, token in enumerate(control_tokens)}
    bos = pieces[model.bos_id()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(controls),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id()], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[model.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def byte_level(vocab: dict[str, int], merges: list[list[str]], controls: dict[str, int]) -> dict[str, Any]:
    """A byte-level BPE tokenizer.json: `vocab` and `merges` in GPT-2's alphabet, numbers split into digits."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(controls),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab | controls,
            "merges": merges,
        },
    }


def write(tokenizer: dict[str, Any], folder: Path) -> None:
    """Write `folder`/tokenizer.json."""
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _added_tokens(controls: dict[str, int]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": id, "content": content, **flags} for content, id in sorted(controls.items(), key=lambda c: c[1])]
