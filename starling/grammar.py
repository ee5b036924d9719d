"""Answers that must follow a JSON Schema or a regular expression: which tokens may come next, through llguidance."""

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from starling.errors import RequestError
from starling.request import MAX_REGEX_BYTES, Request, byte_count
from starling.tokenizer import Tokenizer

# One space or line break at most between two parts: without a bound, a small model can write spaces for ever.
WHITESPACE = r"[ \n]"

# How llguidance reads a schema. oneOf is taken as anyOf: it cannot tell that only one alternative matches where a $ref
# leads to them, say. Without \u a text has one spelling, so no declared key comes back as an additional one; control
# characters without a short escape cannot be written then.
OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "coerce_one_of": True,
    "json_allowed_escapes": 'nrbtf\\"',
}
# What llguidance makes an answer follow.
KEYWORDS = {
    "$ref", "additionalProperties", "allOf", "anyOf", "const", "enum", "exclusiveMaximum", "exclusiveMinimum",
    "format", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minLength",
    "minProperties", "minimum", "multipleOf", "oneOf", "pattern", "patternProperties", "prefixItems", "properties",
    "required", "type",
}  # fmt: skip
# What JSON Schema knows besides, and an answer is not made to follow: llguidance refuses these by name.
REFUSED = {
    "contains", "dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxContains", "minContains",
    "not", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
}  # fmt: skip
NAMING = {"$defs", "definitions", "patternProperties", "properties"}  # whose keys are names, whatever they are
FORMATS = {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}

# Masks are computed on the engine's thread, where every answer waits for them: with llguidance's own limits up to
# 0.6 s for one of a hostile schema, with these 0.06 s. 120 tools of 8 arguments (61 KiB of schema), 2,000 required
# properties or 2,000 values of an enum stay within them. A state of the lexer takes 1 to 2 kB while the answer lasts.
LIMITS = LLParserLimits(
    step_lexer_fuel=300_000, step_max_items=10_000, max_grammar_size=10_000, max_lexer_states=50_000
)
# What none of its limits bounds as it compiles. Each pattern of properties is compared with each other (500 take 30 s).
# Patterns that hold for one text are joined, and each may double what that takes (24 take 55 s and 4 GB; of 12 and more
# none were seen that it could join in the end). A long one takes the square of its length (64 KiB: 13 s). And each
# remainder is a state (999,983 take 6 s and 400 MB; of 150 numbers below the limit none took more than 1.2 s); of a
# large one between large bounds (86,400 within a year) the search may still end with the fuel, in the answer.
MAX_PATTERNS = 16
MAX_PATTERN_BYTES = MAX_REGEX_BYTES
MAX_MULTIPLE = 100_000
LARGEST_INTEGER = 2**53  # its constants are float64
JOINING = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties"}  # two schemas may hold for one value
# How llguidance's errors begin: a line and column of the grammar that we wrote.
PLACE = r'^at \d+\(\d+\): (invalid regex ".*" \(in regex\): |failed to compile JSON schema: )?'
# What does not say to whoever wrote the schema or regex what to change.
REWORDED = {
    r"Failed to generate regex for (\w+) range: .*": r"a bound (\1) is too large; 17 digits are safe",
    r".*NoExtensionBias.*": "no text matches it",
    r"lookarounds not supported yet; \w+": r"^ and $ can stand only at its ends or an alternative's, \\b nowhere,",
}


class GrammarConstraint:
    """The state of one answer in its grammar; satisfies the engine's TokenConstraint.

    The space before the answer is allowed and not part of it (starling/chat.py drops it).
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
        """What went wrong inside the grammar (it grew too complex, say); the request cannot go on."""
        return _brief(self._matcher.get_error() or "") or None


class Grammars:
    """Compiles grammars for one tokenizer, whose turns end with any of `stop_ids`."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self._vocab_size = tokenizer.vocab_size
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, stop_ids)), eos_token=sorted(stop_ids))

    def constraint(self, request: Request) -> GrammarConstraint | None:
        """The request's constraint, or None. Raises RequestError with the grammar's fault. Takes up to four seconds."""
        if request.json_schema is not None:
            name, grammar = "json_schema", _json_grammar(request.json_schema)
        elif request.regex is not None:
            name, grammar = "regex", _regex_grammar(request.regex)
        else:
            return None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise RequestError(f"{name} cannot be followed: {_brief(matcher.get_error())}. Mend or simplify it.")
        return GrammarConstraint(matcher, self._vocab_size)


def _json_grammar(schema: str) -> str:
    objects: list[dict[str, Any]] = []  # at every depth

    def keep(found: dict[str, Any]) -> dict[str, Any]:
        objects.append(found)
        return found

    try:
        parsed = json.loads(schema, object_hook=keep)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more digits than Python reads
        raise RequestError(f"json_schema is not JSON: {error}. Give a JSON Schema as text.") from None
    if not isinstance(parsed, dict):
        raise RequestError(f"json_schema is {schema.strip()[:100]}; give an object that is a JSON Schema.")
    if parsed and not (KEYWORDS | REFUSED) & parsed.keys():
        raise RequestError(
            f"json_schema's keys ({', '.join(parsed)[:200]}) are none that an answer can follow. Put the schema itself "
            'at the top, as in {"type": "object", …}; {} stands for any JSON.'
        )
    _check_cost(objects)
    _check_counts(objects)
    _check_constants(parsed)
    _drop_what_asks_nothing(parsed)
    try:
        schema = json.dumps({**parsed, "x-guidance": OPTIONS}, allow_nan=False)
    except ValueError:  # Python reads NaN, Infinity and 1e400
        raise RequestError("json_schema holds a number that is not finite, which is no JSON. Mend it.") from None
    return LLMatcher.grammar_from_lark(f'start: " "? body\nbody: %json {schema}\n')


def _check_cost(objects: list[dict[str, Any]]) -> None:
    """Raises RequestError for a schema of these objects that would take long to compile."""
    named = [each for found in objects if isinstance(each := found.get("patternProperties"), dict)]
    patterns = sum(map(len, named))
    if patterns > MAX_PATTERNS:
        raise RequestError(
            f"json_schema has {patterns} patterns in patternProperties; at most {MAX_PATTERNS} are accepted. "
            "Name the properties, or drop some patterns."
        )
    texts = {str(found[key]) for found in objects for key in ("pattern", "format") if key in found}
    if len(texts) > MAX_PATTERNS and any(map(_joins, objects)):
        raise RequestError(
            f"json_schema has {len(texts)} different patterns and formats, some of which allOf, anyOf, oneOf, $ref or "
            f"patternProperties may join for one text; then at most {MAX_PATTERNS} are accepted. Drop some."
        )
    size = sum(map(byte_count, texts.union(*named)))
    if size > MAX_PATTERN_BYTES:
        raise RequestError(
            f"json_schema's patterns hold {size} bytes; at most {MAX_PATTERN_BYTES} are accepted. Shorten them."
        )
    multiples: list[Any] = [each for found in objects if type(each := found.get("multipleOf")) in (int, float)]
    digits = set(map(_digits, multiples))
    # Two that hold for one number are joined to their least common multiple; of 0.25 and 0.5 that is 25 * 2 here.
    joined = 1
    for each in digits:  # not all in one call, which of large ones holds Python's lock for half a second
        joined = min(math.lcm(joined, each), MAX_MULTIPLE + 1)
    if not any(JOINING & found.keys() for found in objects):
        joined = min(joined, sum(digits))
    if joined > MAX_MULTIPLE:
        raise RequestError(
            f"json_schema's values of multipleOf come to more than {MAX_MULTIPLE}, decimal points not counted: "
            "in sum, or as their least common multiple where two may hold for one number. Use smaller or fewer ones."
        )


def _joins(found: dict[str, Any]) -> bool:
    """Whether this object, as a schema, may lay two others on one value, or itself beside another."""
    if "patternProperties" in found:
        return True
    parts = len(each) if isinstance(each := found.get("allOf"), list) else 0
    parts += len({"anyOf", "oneOf", "$ref"} & found.keys())
    return parts > 1 or (parts == 1 and bool((KEYWORDS - JOINING - {"type"}) & found.keys()))


def _check_counts(objects: list[dict[str, Any]]) -> None:
    """Raises RequestError where a key that repeats could be counted twice: llguidance lets those repeat that properties
    and required do not name. That is harmless elsewhere, since one schema holds for both values."""
    for found in objects:
        minimum, required = found.get("minProperties"), found.get("required")
        named = len(set(map(str, required))) if isinstance(required, list) else 0
        if type(minimum) is int and minimum > named + 1:
            raise RequestError(
                f"json_schema has minProperties {minimum} beside {named} required keys; at most one more than those is "
                "accepted, since other keys could repeat. Name more keys in required, or lower it."
            )


def _check_constants(schema: dict[str, Any]) -> None:
    """Raises RequestError for an integer that llguidance would round: the answer could not be it."""
    for found in _schemas(schema):
        pending = [found.get("const"), found.get("enum")]
        while pending:
            match pending.pop():
                case int() as number if abs(number) > LARGEST_INTEGER:
                    raise RequestError(
                        f"json_schema has {number} in const or enum; integers beyond {LARGEST_INTEGER} (2^53) would be "
                        "rounded there. Write it as a string."
                    )
                case dict() as values:
                    pending += values.values()
                case list() as values:
                    pending += values


def _drop_what_asks_nothing(schema: dict[str, Any]) -> None:
    """And llguidance refuses: a false uniqueItems; formats it does not know, which to JSON Schema are annotations."""
    for found in _schemas(schema):
        if found.get("uniqueItems") is False:
            del found["uniqueItems"]
        if isinstance(name := found.get("format"), str) and name not in FORMATS:
            del found["format"]


def _schemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and those inside it, whatever keyword they stand under."""
    pending: list[Any] = [schema]
    while pending:
        match pending.pop():
            case dict() as found:
                yield found
                for key, each in found.items():
                    if key in NAMING and isinstance(each, dict):
                        pending += each.values()
                    elif key not in ("const", "enum"):  # which hold values, no schemas
                        pending.append(each)
            case list() as found:
                pending += found


def _digits(number: float) -> int:
    """Its decimal digits, 25 of 0.25; 1 where it is 0 or infinite, which llguidance refuses."""
    digits = re.sub(r"\D", "", f"{Decimal(repr(number).removesuffix('.0')):f}")
    return int(digits or 0) or 1


def _regex_grammar(regex: str) -> str:
    """The regex stands alone in a terminal: so ^ and $ at its ends, or those of its alternatives, mean the answer's, a
    flag holds in it only, and a comment ends with it."""
    if not re.fullmatch(r"(\\.|[^\\])*", regex):
        raise RequestError(r"regex has a backslash at the end of a line, where it escapes nothing. Write \\ or \n.")
    # Not llguidance's regex_to_lark, which writes \n for a line break: that would end no comment of (?x).
    slashed = re.sub(r"\\.|/", lambda unit: r"\/" if unit[0] == "/" else unit[0], regex)
    try:
        return LLMatcher.grammar_from_lark(f'start: ANSWER\nANSWER: " "? REGEX\nREGEX: /{slashed}/\n')
    except UnicodeEncodeError:
        raise RequestError("regex holds a lone surrogate, which is no character; send valid Unicode.") from None


def _brief(error: str) -> str:
    """What helps in an error of llguidance: neither its state and the grammar that we wrote, which come after it, nor
    a place in that grammar, which comes before it, nor carets below a regular expression."""
    said = re.split(r"<state>|\n\s*1 \| ", error)[0]
    said = re.sub(r"regex parse error:\n    (.*)\n.*\nerror: (.*)", r"\2 in regex /\1/", said)
    said = re.sub(r"(?s)regex parse error:.*\nerror: ", "", said)  # of several lines
    said = re.sub(PLACE, "", " ".join(said.split()))
    for theirs, ours in REWORDED.items():
        said = re.sub(theirs, ours, said)
    return said[:300].rstrip(".")


class _Vocabulary:
    """The tokens' bytes, in the form that llguidance asks for."""

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
        """Ids of text in the middle of an answer. SentencePiece would put a space before it: a line break, taken off
        again with that space, stands there instead."""
        if not self._lead:
            return self._tokenizer.encode(text.decode("utf-8", errors="replace"))
        ids = self._tokenizer.encode("\n" + text.decode("utf-8", errors="replace"))
        assert ids[: len(self._lead)] == self._lead
        return ids[len(self._lead) :]
