"""Answers constrained by a JSON Schema or a regular expression: llguidance computes which tokens may come next."""

import re

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from starling.errors import RequestError
from starling.json_schema import json_grammar
from starling.request import Request
from starling.tokenizer import Tokenizer

# Masks are computed on the engine's thread, where every answer waits for them. A hostile schema can make one mask take
# 0.6 s with llguidance's default limits, 0.06 s with these. 120 tools with 8 arguments each (61 KiB of schema), 2,000
# required properties or an enum of 2,000 values stay within them (the tools but for 2 of 900 texts at temperature 5).
# A lexer state takes 1 to 2 kB while the answer lasts.
LIMITS = LLParserLimits(
    step_lexer_fuel=300_000, step_max_items=10_000, max_grammar_size=10_000, max_lexer_states=50_000
)
# What llguidance's errors begin with: a line and column in the grammar that we generated.
PLACE = r'^at \d+\(\d+\): (invalid regex ".*" \(in regex\): |failed to compile JSON schema: )?'
# Errors that do not tell the author of the schema or regex what to change.
REWORDED = {
    r"Failed to generate regex for (\w+) range: .*": r"a bound (\1) is too large; 17 digits are safe",
    r".*NoExtensionBias.*": "no text matches it",
    r"lookarounds not supported yet; \w+": r"^ and $ may stand only at its ends or an alternative's, and \\b nowhere,",
}


class GrammarConstraint:
    """The state of one answer in its grammar; implements the engine's TokenConstraint.

    The space before the answer is allowed but is not part of it (starling/chat.py drops it).
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    def mask(self) -> np.ndarray:
        mask = np.zeros(self._words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)

    @property
    def fault(self) -> str | None:
        """What went wrong inside the grammar (it grew too complex, for example); the request cannot continue."""
        return _brief(self._matcher.get_error() or "") or None


class Grammars:
    """Compiles grammars for one tokenizer, whose turns end with any of `stop_ids`."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self._vocab_size = tokenizer.vocab_size
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, stop_ids)), eos_token=sorted(stop_ids))

    def constraint(self, request: Request) -> GrammarConstraint | None:
        """The request's constraint, or None. Raises RequestError if its grammar is at fault. Takes up to 4 seconds."""
        if request.json_schema is not None:
            name, grammar = "json_schema", json_grammar(request.json_schema)
        elif request.regex is not None:
            name, grammar = "regex", _regex_grammar(request.regex)
        else:
            return None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise RequestError(f"{name} cannot be followed: {_brief(matcher.get_error())}. Fix or simplify it.")
        return GrammarConstraint(matcher, self._vocab_size)


def _regex_grammar(regex: str) -> str:
    """The regex gets a terminal of its own. So ^ and $ at its ends, or at those of its alternatives, mean the ends of
    the answer; a flag applies only inside it; and a comment ends with it."""
    if not re.fullmatch(r"(\\.|[^\\])*", regex):
        raise RequestError(r"regex has a backslash at the end of a line, where it escapes nothing. Write \\ or \n.")
    # Not llguidance's regex_to_lark, which writes a line break as \n, and that would not end a (?x) comment.
    slashed = re.sub(r"\\.|/", lambda unit: r"\/" if unit[0] == "/" else unit[0], regex)
    try:
        return LLMatcher.grammar_from_lark(f'start: ANSWER\nANSWER: " "? REGEX\nREGEX: /{slashed}/\n')
    except UnicodeEncodeError:
        raise RequestError("regex contains a lone surrogate, which is not a character; send valid Unicode.") from None


def _brief(error: str) -> str:
    """The useful part of an llguidance error: without its state and our generated grammar, which follow it, the
    position in that grammar, which precedes it, and the carets below a regular expression."""
    said = re.split(r"<state>|\n\s*1 \| ", error)[0]
    said = re.sub(r"regex parse error:\n    (.*)\n.*\nerror: (.*)", r"\2 in regex /\1/", said)
    said = re.sub(r"(?s)regex parse error:.*\nerror: ", "", said)  # of a regex with several lines
    said = re.sub(PLACE, "", " ".join(said.split()))
    for theirs, ours in REWORDED.items():
        said = re.sub(theirs, ours, said)
    return re.sub(r"in regex /(.*)/$", r"in the regex \1", said.rstrip("."))[:300]


class _Vocabulary:
    """The tokens' bytes, in the form that llguidance expects."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self.eos_token_id = min(stop_ids)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = [token for token, spelt in enumerate(self.tokens) if not spelt]
        for token in self.special_token_ids:
            self.tokens[token] = f"<control {token}>".encode()
        self._tokenizer = tokenizer
        self._lead = tokenizer.encode("\n") if tokenizer.decode(tokenizer.encode("a")) == " a" else []

    def __call__(self, text: bytes) -> list[int]:
        """Ids of text in the middle of an answer. SentencePiece would put a space before it, so encode it after a line
        break, and strip the tokens of both."""
        if not self._lead:
            return self._tokenizer.encode(text.decode("utf-8", errors="replace"))
        ids = self._tokenizer.encode("\n" + text.decode("utf-8", errors="replace"))
        assert ids[: len(self._lead)] == self._lead
        return ids[len(self._lead) :]
