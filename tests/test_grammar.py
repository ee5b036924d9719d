"""Which texts a schema or regex allows, token by token, without a model."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from starling import tokenizer_json
from starling.errors import RequestError
from starling.grammar import Grammars
from starling.json_schema import FORMATS, KEYWORDS, REFUSED
from starling.request import Request
from starling.tokenizer import Tokenizer

END = 2

Follows = Callable[[str, dict[str, Any]], bool]


@pytest.fixture(scope="module")
def grammars(demo_folder: Path) -> Grammars:
    return Grammars(Tokenizer.from_folder(demo_folder, 49152), frozenset({END}))


@pytest.fixture(scope="module")
def follows(demo_folder: Path, grammars: Grammars) -> Follows:
    """Whether this whole text is a valid answer under this schema."""
    tokenizer = Tokenizer.from_folder(demo_folder, 49152)

    def ask(text: str, schema: dict[str, Any]) -> bool:
        constraint = grammars.constraint(Request.parse(prompt="x", json_schema=json.dumps(schema)))
        assert constraint is not None
        for token in [*tokenizer.encode(text), END]:
            if not constraint.mask()[token // 32] >> token % 32 & 1:
                return False
            if token != END:
                constraint.advance(token)
        return True

    return ask


@pytest.mark.parametrize("name", ["b", "é", "\n", '"'])
def test_a_declared_key_comes_once(follows: Follows, name: str) -> None:
    """A second value for it, under any spelling, would be checked as an additional property."""
    schema = {"properties": {name: {"type": "integer"}}}
    key, escaped = json.dumps(name, ensure_ascii=False), f'"\\u{ord(name):04x}"'
    assert follows(f'{{{key}:1,"c":"x","c":2}}', schema)
    assert not follows(f'{{{key}:1,{key}:"x"}}', schema)
    assert not follows(f'{{{key}:1,{escaped}:"x"}}', schema)
    pattern = {"patternProperties": {"^b": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    assert follows('{"b":1,"cb":"x"}', pattern)
    assert not follows('{"b":1,"\\u0062":"x"}', pattern)


OPEN = {"additionalProperties": {"type": "integer"}}


@pytest.mark.parametrize("keys", [{}, {"required": ["a", "b"]}, {"required": ["a", "b", "b"], "patternProperties": {}}])
def test_keys_that_may_repeat_are_not_counted(follows: Follows, keys: dict[str, Any]) -> None:
    named = 2 if keys else 0
    text = '{"a":1,"b":1,' if keys else "{"
    assert follows(text + '"c":1}', OPEN | keys | {"minProperties": named + 1, "maxProperties": named + 1})
    assert not follows(text + '"c":1,"d":1}', OPEN | keys | {"maxProperties": named + 1})
    with pytest.raises(RequestError, match=f"minProperties {named + 2} with {named} required keys.*Name more"):
        follows("{}", {"items": OPEN | keys | {"minProperties": named + 2}})


def test_at_most_one_space_or_line_break_separates_json_tokens(follows: Follows) -> None:
    """Otherwise a small model may write spaces for ever."""
    for text in ('{"a":1}', '{ "a": 1 }', '{\n"a": 1\n}'):
        assert follows(text, {})
    for text in ('{"a":  1}', '{\n "a": 1}', '{\t"a": 1}'):
        assert not follows(text, {})


def test_one_of_is_any_of(follows: Follows) -> None:
    kinds = {
        kind: {
            "type": "object",
            "properties": {"kind": {"const": kind}, "of": {"type": "array", "items": {"$ref": "#"}}},
            "required": ["kind"],
            "additionalProperties": False,
        }
        for kind in ("leaf", "tree")
    }
    schema = {"oneOf": [{"$ref": f"#/$defs/{kind}"} for kind in kinds], "$defs": kinds}
    assert follows('{"kind":"tree","of":[{"kind":"leaf"}]}', schema)
    assert not follows('{"kind":"twig"}', schema)
    assert follows("1.5", {"oneOf": [{"type": "integer"}, {"type": "number"}]})


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_known_format_is_followed(follows: Follows, name: str) -> None:
    assert not follows('"no such text"', {"type": "string", "format": name})


def test_an_unknown_format_is_ignored(follows: Follows) -> None:
    for name in ("password", "uuid4", "uri-reference"):
        assert follows('"no such text"', {"$defs": {"a": {"type": "string", "format": name}}, "$ref": "#/$defs/a"})
        assert follows('["x"]', {"items": {"anyOf": [{"type": "string", "format": name}]}})
    assert follows('{"format":"x"}', {"properties": {"format": {"type": "string", "format": "password"}}})
    with pytest.raises(RequestError, match="schema must be an object"):
        follows("{}", {"properties": {"format": "string"}})
    file = {"format": "png"}
    for schema in ({"const": file}, {"enum": [file]}, {"properties": {"format": {"const": "png"}}}):
        assert follows('{"format":"png"}', schema)
        assert not follows('{"format":"gif"}', schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"name": "p", "strict": True, "schema": {"type": "object"}},
        {"name": "string", "age": "integer"},
        {"$defs": {"a": {"type": "string"}}, "title": "A"},
    ],
)
def test_a_schema_without_a_known_keyword_is_refused(follows: Follows, schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"no keyword .* \(its keys: .*\)\. Put the schema itself at the top"):
        follows("{}", schema)
    assert follows("{}", {})


@pytest.mark.parametrize("keyword", sorted(REFUSED))
def test_what_cannot_be_followed_is_refused_by_name(follows: Follows, keyword: str) -> None:
    with pytest.raises(RequestError, match=rf'cannot be followed: Unimplemented keys: \["{keyword}"\]'):
        follows("1", {keyword: {}})


def test_patterns_that_never_apply_to_the_same_string_are_not_counted(follows: Follows) -> None:
    """As schema generators write them: properties that may be null, and properties that a $ref describes."""
    named = {f"Kind{i}": {"type": "string", "pattern": f"^{i}[a-z]*$", "title": "Kind"} for i in range(20)}
    fields = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/Kind{i}"}, {"type": "null"}], "default": None} for i in range(20)}
    fields |= {f"b{i}": {"$ref": f"#/$defs/Kind{i}", "description": "A kind."} for i in range(20)}
    fields |= {f"c{i}": {"allOf": [{"$ref": f"#/$defs/Kind{i}"}], "title": "C"} for i in range(20)}
    schema = {"$defs": named, "type": "object", "properties": fields, "additionalProperties": False}
    assert follows('{"a1": "1x", "b2": "2y", "c3": "3z"}', schema)
    assert not follows('{"c3": "2z"}', schema)


def test_a_false_unique_items_is_ignored(follows: Follows) -> None:
    assert follows("[[1, 1]]", {"uniqueItems": False, "items": {"type": "array", "uniqueItems": False}})
    assert follows('{"uniqueItems": 1}', {"type": "object", "properties": {"uniqueItems": {"const": 1}}})


@pytest.mark.parametrize("keyword", sorted(KEYWORDS - {"const"}))
def test_llguidance_knows_every_keyword(follows: Follows, keyword: str) -> None:
    """It reads each of them, and so refuses an invalid value. (Any value is valid for const.)"""
    with pytest.raises(RequestError, match="cannot be followed"):
        follows("[0]", {keyword: {"$ref": "#/no"}})


def test_multiples_count_by_their_digits(follows: Follows) -> None:
    assert follows("100000", {"multipleOf": 100000}), "the most that is accepted"
    assert follows("86400", {"multipleOf": 86400.0}), "86400.0 counts as 86400"
    apart = {"properties": {"day": {"multipleOf": 86400}, "half": {"multipleOf": 43200}}}
    assert follows('{"day":86400,"half":43200}', apart), "one is a multiple of the other"
    assert follows("0.0000003", {"multipleOf": 1e-7})
    optional = {"properties": {"a": {"anyOf": [{"multipleOf": 86400}, {"type": "null"}]}, "b": {"multipleOf": 86400}}}
    assert follows('{"a":86400,"b":172800}', optional), "never two for one number"
    optional["properties"]["c"] = {"multipleOf": 1e-6}
    assert follows('{"a":86400,"b":172800,"c":0.000003}', optional), "nor with other decimal places"
    for large in ({"prefixItems": [{"multipleOf": 999983}, {"multipleOf": 0}]}, {"multipleOf": 1e16}):
        with pytest.raises(RequestError, match="more than 100000"):
            follows("[]", large)


@pytest.mark.parametrize(
    "values", [(70000, 70000), (0.00001, 42950), (1e-9, 99991), (0.5, 65537, 65537), (1e-300, 7), (-70000, 70000)]
)
def test_multiples_that_would_be_joined_wrongly_are_refused(follows: Follows, values: tuple[float, ...]) -> None:
    """llguidance would follow 8643 for the first two, and take 10 s for the third with an integer."""
    with pytest.raises(RequestError, match=r"does not fit 32 bits|more than 100000"):
        follows("70000", {"type": "integer", "allOf": [{"multipleOf": value} for value in values]})


@given(st.lists(st.one_of(st.integers(1, 400), st.integers(1, 400).map(lambda n: n / 8)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_several_multiples_hold_at_once(follows: Follows, values: list[float]) -> None:
    """Or are refused. Checked at the least common multiple, at a half of it, and at each alone."""
    schema = {"type": "number", "allOf": [{"multipleOf": value} for value in values]}
    eighths = [int(value * 8) for value in values]
    for number in {math.lcm(*eighths), math.lcm(*eighths) // 2, *eighths}:
        try:
            assert follows(f"{number / 8:.10g}", schema) == all(number % each == 0 for each in eighths), number / 8
        except RequestError as error:
            assert re.search(r"32 bits|more than 100000|fuel", str(error))


BOUNDS = st.one_of(st.integers(-3, 3), st.integers(-25, 25).map(lambda n: n / 8), st.sampled_from([0.05, -0.1, 99.5]))
NUMBERS = st.fixed_dictionaries(
    {"type": st.just("number")},
    optional=dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), BOUNDS),
)


@given(schema=NUMBERS, joined=st.none() | NUMBERS, numbers=st.lists(BOUNDS, min_size=1))
@example(schema={"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, joined=None, numbers=[0, 0.125, 0.5])
@example(schema={"type": "number", "exclusiveMinimum": 0}, joined={"maximum": 0.5}, numbers=[0, 0.125, 0.5])
@example(schema={"type": "number", "exclusiveMaximum": 2, "minimum": 1.5}, joined=None, numbers=[1.5, 1.625, 2])
@example(schema={"type": "number", "exclusiveMaximum": 0, "minimum": -0.5}, joined=None, numbers=[-0.0, -0.125])
@settings(deadline=None, max_examples=40)
def test_bounds_hold(
    follows: Follows, schema: dict[str, Any], joined: dict[str, Any] | None, numbers: list[float]
) -> None:
    """And allow the rest. llguidance alone would let 0 through as 0 < x <= 0.5."""
    if joined is not None:
        schema = {**schema, "allOf": [joined]}
    judge = jsonschema.Draft202012Validator(schema)
    for number in [*numbers, *(value for value in schema.values() if isinstance(value, int | float))]:
        try:
            assert follows(json.dumps(number).removesuffix(".0"), schema) == judge.is_valid(number), number
        except RequestError as error:
            assert "Unsatisfiable" in str(error)


@pytest.mark.parametrize("schema", [{"properties": 5}, {"patternProperties": 5}, {"required": 5, "minProperties": 2}])
def test_a_keyword_with_a_value_of_another_type_is_refused(follows: Follows, schema: dict[str, Any]) -> None:
    """And does not break our own checks, which come first."""
    with pytest.raises(RequestError, match=r"cannot be followed|Name more keys"):
        follows("{}", schema)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('{"city": "Zoë 🦜"}', {"json_schema": json.dumps({"const": {"city": "Zoë 🦜"}})}),
        ("Zoë 🦜", {"regex": "Zoë 🦜"}),
    ],
    ids=["schema", "regex"],
)
def test_a_grammar_is_followed_in_starlings_own_tokens(text: str, fields: dict[str, str]) -> None:
    """SentencePiece puts a space before a text, and writes characters without a piece as bytes."""
    tokenizer = Tokenizer(tokenizer_json.starling_tokenizer(), 32002)
    constraint = Grammars(tokenizer, frozenset({32000, END})).constraint(Request.parse(prompt="x", **fields))
    assert constraint is not None
    for token in [*tokenizer.encode(text), None]:
        mask = constraint.mask()
        ends = [bool(mask[end // 32] >> end % 32 & 1) for end in (END, 32000)]
        assert ends == [token is None] * 2, "it may end with either stop id, but only when it is complete"
        if token is not None:
            assert mask[token // 32] >> token % 32 & 1
            constraint.advance(token)
    assert constraint.fault is None


@pytest.mark.parametrize("key", ["const", "enum"])
def test_a_constant_that_would_be_rounded_is_refused(follows: Follows, key: str) -> None:
    def schema(number: int) -> dict[str, Any]:
        return {"items": {key: [{"id": number}]}}

    for exact in (2**53, -(2**53)):
        value = [[{"id": exact}] if key == "const" else {"id": exact}]
        assert follows(json.dumps(value), schema(exact))
        with pytest.raises(RequestError, match=r"9007199254740993 in const or enum.*2\^53.*as a string"):
            follows("1", schema(exact + (1 if exact > 0 else -1)))


@given(value=st.text(st.characters(max_codepoint=0xFFFF, codec="utf-8")) | st.text("\x00\x08\t\x0b\n\r\x1fa\x7f"))
def test_a_text_is_written_as_it_is_or_refused(follows: Follows, value: str) -> None:
    schema = {"const": {"key": value}}
    if bad := [each for each in value if (each < " " and each not in "\b\t\n\f\r") or each == "\x7f"]:
        with pytest.raises(RequestError, match=rf"U\+{ord(bad[0]):04X} in const or enum.*Remove it"):
            follows("1", schema)
    else:
        assert follows(json.dumps({"key": value}, ensure_ascii=False), schema)


def test_a_number_of_too_many_digits_is_refused(follows: Follows) -> None:
    for number in (0.1, -123456789.123456, 2.5):
        assert follows(str(number), {"enum": [number]})
    with pytest.raises(RequestError, match=r"24\.580338977940386 in const or enum.*15 digits.*Round it"):
        follows("1", {"enum": ["x", 24.580338977940386]})


@pytest.mark.parametrize("name", ["const", "enum", "format", "properties"])
@pytest.mark.parametrize("keyword", ["$defs", "definitions", "patternProperties", "properties"])
def test_a_name_is_not_mistaken_for_a_keyword(follows: Follows, keyword: str, name: str) -> None:
    referred = keyword in ("$defs", "definitions")

    def named(schema: dict[str, Any]) -> dict[str, Any]:
        return {keyword: {name: schema}} | ({"items": {"$ref": f"#/{keyword}/{name}"}} if referred else {})

    def text(value: str) -> str:
        return f"[{value}]" if referred else f'{{"{name}":{value}}}'

    assert follows(text("1"), named({"type": "integer", "maximum": 2**60}))
    assert not follows(text(str(2**61)), named({"type": "integer", "maximum": 2**60}))
    assert follows(text('"x"'), named({"type": "string", "format": "password"}))
    with pytest.raises(RequestError, match="9007199254740993 in const or enum"):
        follows(text("1"), named({"const": 2**53 + 1}))


def test_numbers_too_large_for_llguidance_are_refused(follows: Follows) -> None:
    with pytest.raises(RequestError, match=r"a bound \(integer\) is too large; 17 digits are safe\. Fix"):
        follows("1", {"type": "integer", "minimum": 10**20})
    assert follows("1" + "0" * 17, {"type": "integer", "minimum": 10**17 - 1})
