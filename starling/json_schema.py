"""A JSON Schema as llguidance can follow it: what it would follow wrongly, or at too great a cost, is refused."""

import json
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from itertools import accumulate
from typing import Any

from llguidance import LLMatcher

from starling.errors import RequestError
from starling.request import MAX_REGEX_BYTES, byte_count

# At most one space or line break between two JSON tokens: without a bound, a small model can write spaces for ever.
WHITESPACE = r"[ \n]"

# How llguidance reads a schema. oneOf is treated as anyOf, because llguidance cannot always tell that only one
# alternative matches (behind a $ref, for example). Without \u escapes a string has only one spelling, so no declared
# key can reappear as an additional one; but control characters without a short escape cannot be written.
OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "coerce_one_of": True,
    "json_allowed_escapes": 'nrbtf\\"',
}
# Keywords that llguidance enforces.
KEYWORDS = {
    "$ref", "additionalProperties", "allOf", "anyOf", "const", "enum", "exclusiveMaximum", "exclusiveMinimum",
    "format", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minLength",
    "minProperties", "minimum", "multipleOf", "oneOf", "pattern", "patternProperties", "prefixItems", "properties",
    "required", "type",
}  # fmt: skip
# JSON Schema's other constraints, which cannot be enforced: llguidance refuses them by name.
REFUSED = {
    "contains", "dependencies", "dependentRequired", "dependentSchemas", "else", "if", "maxContains", "minContains",
    "not", "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
}  # fmt: skip
NAMING = {"$defs", "definitions", "patternProperties", "properties"}  # the keys of these are names, not keywords
FORMATS = {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}

# What llguidance's limits do not bound is the cost of compiling. Each pattern in patternProperties is compared with
# every other (500 take 30 s). Patterns that apply to one string are joined, and each may double the cost (24 take 55 s
# and 4 GB; no set of 12 or more was seen that it could join in the end). A pattern costs the square of its length
# (64 KiB: 13 s). Each remainder of multipleOf is a state (999,983 take 6 s and 400 MB; of 150 numbers below the limit,
# none took more than 1.2 s); for a large one between large bounds (86,400 within a year), the answer may still run out
# of fuel.
MAX_PATTERNS = 16
MAX_PATTERN_BYTES = MAX_REGEX_BYTES
MAX_MULTIPLE = 100_000
LARGEST_INTEGER = 2**53  # llguidance's constants are float64
SAFE_DIGITS = 15  # of other numbers: llguidance reads some that have more as the next float
UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")  # under OPTIONS; llguidance drops them from constants
JOINING = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties"}  # through these, two schemas may apply to one value


def json_grammar(schema: str) -> str:
    """llguidance's grammar of the values that match a JSON Schema, given as text. Raises RequestError."""
    objects: list[dict[str, Any]] = []  # at every depth

    def keep(found: dict[str, Any]) -> dict[str, Any]:
        objects.append(found)
        return found

    try:
        parsed = json.loads(schema, object_hook=keep)
    except (ValueError, RecursionError) as error:  # ValueError also for integers with more digits than Python reads
        raise RequestError(f"json_schema is not JSON: {error}. Give a JSON Schema as text.") from None
    if not isinstance(parsed, dict):
        raise RequestError(f"json_schema is {schema.strip()[:100]}; give an object that is a JSON Schema.")
    if parsed and not (KEYWORDS | REFUSED) & parsed.keys():
        raise RequestError(
            f"json_schema has no keyword that an answer can follow (its keys: {', '.join(parsed)[:200]}). Put the "
            'schema itself at the top level, as in {"type": "object", …}; {} allows any JSON.'
        )
    joins = any(map(_joins, objects))
    _check_patterns(objects, joins)
    _check_multiples(objects, joins)
    _check_counts(objects)
    _check_constants(parsed)
    _drop_no_ops(parsed)
    _close_bounds(parsed, joins)
    try:
        schema = json.dumps({**parsed, "x-guidance": OPTIONS}, allow_nan=False)
    except ValueError:  # Python reads NaN, Infinity and 1e400
        raise RequestError("json_schema contains a number that is not finite, so it is not JSON. Fix it.") from None
    return LLMatcher.grammar_from_lark(f'start: " "? body\nbody: %json {schema}\n')


def _check_patterns(objects: list[dict[str, Any]], joins: bool) -> None:
    """Raises RequestError if patterns and formats could take too long to compile."""
    named = [each for found in objects if isinstance(each := found.get("patternProperties"), dict)]
    patterns = sum(map(len, named))
    if patterns > MAX_PATTERNS:
        raise RequestError(
            f"json_schema has {patterns} patterns in patternProperties; at most {MAX_PATTERNS} are accepted. "
            "Name the properties, or drop some patterns."
        )
    texts = {str(found[key]) for found in objects for key in ("pattern", "format") if key in found}
    if len(texts) > MAX_PATTERNS and joins:
        raise RequestError(
            f"json_schema has {len(texts)} different patterns and formats, and allOf, anyOf, oneOf, $ref or "
            f"patternProperties may apply several to one string; then at most {MAX_PATTERNS} are accepted. Drop some."
        )
    size = sum(map(byte_count, texts.union(*named)))
    if size > MAX_PATTERN_BYTES:
        raise RequestError(
            f"json_schema's patterns have {size} bytes in all; at most {MAX_PATTERN_BYTES} are accepted. Shorten them."
        )


def _check_multiples(objects: list[dict[str, Any]], joins: bool) -> None:
    """Raises RequestError if values of multipleOf could take too long to compile, or overflow when joined."""
    values: list[Any] = [each for found in objects if type(each := found.get("multipleOf")) in (int, float)]
    multiples = Counter(map(_digits, values))
    digits = {digits for digits, _ in multiples}
    # Two that apply to one number are joined into their least common multiple.
    joined = 1
    for each in digits:  # not all in one call, which for large ones holds the GIL for half a second
        joined = min(math.lcm(joined, each), MAX_MULTIPLE + 1)
    if not any(JOINING & found.keys() for found in objects):
        joined = min(joined, sum(digits))
    if joined > MAX_MULTIPLE:
        raise RequestError(
            f"json_schema's multipleOf values come to more than {MAX_MULTIPLE}, ignoring decimal points: their sum, or "
            "their least common multiple where two may apply to one number. Use smaller or fewer ones."
        )
    if joins and _largest_product(multiples) >= 2**32:
        raise RequestError(
            "json_schema has multipleOf values whose product, ignoring decimal points, does not fit 32 bits, and "
            "allOf, anyOf, oneOf, $ref or patternProperties may apply them to one number. Use smaller or fewer ones."
        )


def _largest_product(multiples: Counter[tuple[int, int]]) -> int:
    """The largest number that llguidance may compute to join any of these (digits, places); from 2**32 on, a bound.

    It scales a and b to integers and computes a * b / gcd(a, b), in uint32. An overflow goes unnoticed there, and the
    answer would be a multiple of another number.
    """
    most = max((places for _, places in multiples), default=0)
    scaled = [
        digits * 10 ** (most - places) for (digits, places), count in multiples.items() for _ in range(min(count, 2))
    ]

    def lcm(a: int, b: int) -> int:
        return min(math.lcm(a, b), 2**32)

    before = accumulate(scaled, lcm, initial=1)
    after = [*accumulate(reversed(scaled), lcm, initial=1)][-2::-1]  # of those after each
    return max((each * lcm(a, b) for each, a, b in zip(scaled, before, after, strict=False)), default=0)


def _joins(found: dict[str, Any]) -> bool:
    """Whether this object, as a schema, may apply two others to one value, or another in addition to itself."""
    if "patternProperties" in found:
        return True
    parts = len(each) if isinstance(each := found.get("allOf"), list) else 0
    parts += len({"anyOf", "oneOf", "$ref"} & found.keys())
    return parts > 1 or (parts == 1 and bool((KEYWORDS - JOINING - {"type"}) & found.keys()))


def _check_counts(objects: list[dict[str, Any]]) -> None:
    """Raises RequestError where a repeated key could be counted twice: llguidance lets a key repeat if neither
    properties nor required names it. Elsewhere that is harmless, since one schema applies to both values."""
    for found in objects:
        minimum, required = found.get("minProperties"), found.get("required")
        named = len(set(map(str, required))) if isinstance(required, list) else 0
        if type(minimum) is int and minimum > named + 1:
            raise RequestError(
                f"json_schema has minProperties {minimum} with {named} required keys; at most one more than those is "
                "accepted, since other keys could repeat. Name more keys in required, or lower it."
            )


def _check_constants(schema: dict[str, Any]) -> None:
    """Raises RequestError for a constant that llguidance would change: no answer could equal it."""
    for found in _schemas(schema):
        pending = [found.get("const"), found.get("enum")]
        while pending:
            match pending.pop():
                case int() as number if abs(number) > LARGEST_INTEGER:
                    raise RequestError(
                        f"json_schema has {number} in const or enum; integers beyond {LARGEST_INTEGER} (2^53) would be "
                        "rounded there. Write it as a string."
                    )
                case float() as number if abs(number) < math.inf and float(f"{number:.{SAFE_DIGITS}g}") != number:
                    raise RequestError(
                        f"json_schema has {number} in const or enum; numbers of more than {SAFE_DIGITS} digits may "
                        "change there. Round it."
                    )
                case str() as text if unwritable := UNWRITABLE.search(text):
                    raise RequestError(
                        f"json_schema has the character U+{ord(unwritable[0]):04X} in const or enum; answers have no "
                        "control characters but \\b, \\t, \\n, \\f and \\r. Remove it."
                    )
                case dict() as values:
                    pending += [*values, *values.values()]
                case list() as values:
                    pending += values


def _drop_no_ops(schema: dict[str, Any]) -> None:
    """Drop what constrains nothing, yet llguidance refuses: a false uniqueItems, and formats that it does not know,
    which are annotations in JSON Schema."""
    for found in _schemas(schema):
        if found.get("uniqueItems") is False:
            del found["uniqueItems"]
        if isinstance(name := found.get("format"), str) and name not in FORMATS:
            del found["format"]


def _close_bounds(schema: dict[str, Any], joins: bool) -> None:
    """Move a bound like the 0 of 0 < x <= 0.5 inward by 1e-9, and include it: llguidance would allow the 0.

    It overlooks that a whole number is excluded where the other bound, here or where schemas are joined in another of
    them, is less than 1 away.
    """
    schemas = [*_schemas(schema)]
    for group in [schemas] if joins else [[found] for found in schemas]:
        for exclusive, inclusive, opposite, sign in (
            ("exclusiveMinimum", "minimum", ("maximum", "exclusiveMaximum"), 1),
            ("exclusiveMaximum", "maximum", ("minimum", "exclusiveMinimum"), -1),
        ):
            others = sorted(sign * found[key] for found in group for key in opposite if _is_exact(found.get(key)))
            for found in group:
                bound: Any = found.get(exclusive)
                if not _is_exact(bound) or bound != int(bound):
                    continue
                beyond = bisect_right(others, sign * bound)
                if beyond < len(others) and (distance := others[beyond] - sign * bound) < 1:
                    moved = [bound + sign * min(max(1e-9, math.ulp(bound)), distance / 2)]
                    moved += [found[inclusive]] if _is_exact(found.get(inclusive)) else []
                    del found[exclusive]
                    found[inclusive] = max(moved) if sign > 0 else min(moved)


def _is_exact(value: Any) -> bool:
    """Whether it is a number below 2**53 in magnitude, where float64 holds every whole number exactly."""
    return type(value) in (int, float) and abs(value) < LARGEST_INTEGER


def _schemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and every schema nested in it, under any keyword."""
    pending: list[Any] = [schema]
    while pending:
        match pending.pop():
            case dict() as found:
                yield found
                for key, each in found.items():
                    if key in NAMING and isinstance(each, dict):
                        pending += each.values()
                    elif key not in ("const", "enum"):  # which hold values, not schemas
                        pending.append(each)
            case list() as found:
                pending += found


def _digits(number: float) -> tuple[int, int]:
    """The number without its decimal point, and its decimal places: (25, 2) for 0.25.

    For 0 and infinity, which llguidance refuses, the number is 1.
    """
    whole, _, places = f"{Decimal(repr(number).removesuffix('.0')):f}".partition(".")
    return int(re.sub(r"\D", "", whole + places) or 0) or 1, len(places)
