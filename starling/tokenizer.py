"""Text → token ids and back, by tokenizer.json. Text becomes text tokens only; control tokens are looked up by name."""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder

from starling.errors import CheckpointError, RequestError
from starling.json_file import read_json_object

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name for a byte without a piece of its own


class Tokenizer:
    """One checkpoint's tokenizer, with ids below `vocab_size` (the rows of its embedding table).

    The added tokens of tokenizer.json (`<s>`, `<|end_of_turn|>` and the like) are removed from the encoder, as are
    merges that would produce one. So no text can become a control token, whatever it says.
    """

    def __init__(self, raw: dict[str, Any], vocab_size: int, source: str = "tokenizer.json") -> None:
        """`raw`: tokenizer.json as parsed; modified here. Raises CheckpointError naming what is not implemented."""
        self.vocab_size = vocab_size
        try:
            model, decoder = raw["model"], json.dumps(raw["decoder"])
            controls: dict[str, int] = {token["content"]: token["id"] for token in raw["added_tokens"]}
            pieces: dict[str, int] = model["vocab"]
            if model.get("type", "BPE") != "BPE" or model.get("ignore_merges"):
                kind = f"type {model.get('type', 'BPE')!r}, ignore_merges {model.get('ignore_merges', False)}"
                raise CheckpointError(f"{source} holds a tokenizer of {kind}; implemented: 'BPE', with its merges.")
            model["merges"] = [merge for merge in model["merges"] if _product(merge) not in controls]
            raw |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            self._encoder = Encoder.from_str(json.dumps(raw))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{source} is not a complete tokenizer.json: {error!r}. Fetch it again.") from error
        except Exception as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{source} cannot be read: {error}. Fetch it again.") from error
        self._controls = controls
        self._source = source
        text_pieces = {piece: id for piece, id in pieces.items() if piece not in controls}
        largest = max(text_pieces.values(), default=-1)
        if largest >= vocab_size:
            raise CheckpointError(
                f"{source} has token id {largest}, but the embedding table has {vocab_size} rows: they belong to "
                "different models. Fetch both again."
            )
        self._bytes = _byte_table(text_pieces, decoder, vocab_size, source)

    @classmethod
    def from_folder(cls, folder: Path, vocab_size: int) -> "Tokenizer":
        """Read `folder`/tokenizer.json. Raises CheckpointError."""
        path = folder / "tokenizer.json"
        return cls(read_json_object(path), vocab_size, source=str(path))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without a beginning-of-text token. Raises RequestError if it is not valid Unicode."""
        try:
            # As a batch of one: `encode` holds the GIL throughout, for a second with the longest text allowed, and so
            # would stall every stream and the engine.
            (encoded,) = self._encoder.encode_batch_fast([text], add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            # A lone half of a surrogate pair: JSON can carry it as an escape, UTF-8 cannot.
            raise RequestError(
                "The text contains a lone surrogate, which is not a character; send valid Unicode."
            ) from error
        ids: list[int] = encoded.ids
        return ids

    def token_id(self, content: str) -> int:
        """The id of the control token of this name. Raises CheckpointError if it has none in the embedding table."""
        token = self._controls.get(content)
        if token is None:
            names = sorted(self._controls)  # Llama 3 has 256
            found = ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise CheckpointError(f"{self._source} has no token {content!r}; it has {found or 'none'}.")
        if not 0 <= token < self.vocab_size:
            raise CheckpointError(
                f"{self._source} gives {content!r} the id {token}, outside the embedding table of {self.vocab_size} "
                "rows."
            )
        return token

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to a text: nothing if it is a control token or an unused row of the embedding table."""
        return self._bytes[token]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`, with its leading space; bytes that are not valid UTF-8 become U+FFFD."""
        return b"".join(self._bytes[token] for token in tokens).decode("utf-8", errors="replace")


class IncrementalDecoder:
    """One stream of tokens → text. Joined output equals `decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The characters that `token` completes; the bytes of an unfinished one wait for the next token."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character cut short."""
        return self._utf8.decode(b"", final=True)


def byte_alphabet() -> dict[str, int]:
    """Printable character → the byte that it stands for in byte-level BPE.

    Bytes that are printable in Latin-1 are written as that character, the others as U+0100 onwards (GPT-2's table).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_table(pieces: dict[str, int], decoder: str, vocab_size: int, source: str) -> list[bytes]:
    """Each id's bytes. `decoder`: the decoder of tokenizer.json as JSON, which says how pieces spell bytes."""
    table = [b""] * vocab_size
    alphabet = byte_alphabet()
    byte_level = '"ByteLevel"' in decoder
    if not byte_level and '"ByteFallback"' not in decoder:
        raise CheckpointError(f"{source} has decoder {decoder}; implemented: ByteLevel, and Replace with ByteFallback.")
    for piece, id in pieces.items():
        if byte_level:
            try:
                table[id] = bytes(alphabet[character] for character in piece)
            except KeyError as error:
                raise CheckpointError(f"{source}: token {piece!r} is not in the byte-level alphabet.") from error
        elif match := BYTE_PIECE.fullmatch(piece):
            table[id] = bytes.fromhex(match[1])
        else:
            table[id] = piece.replace("▁", " ").encode("utf-8")
    return table


def _product(merge: str | Sequence[str]) -> str:
    """The piece that a merge produces. Older files write the pair as one string, separated by a space."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)
