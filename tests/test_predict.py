"""The form that Cog shows agrees with what a request may hold, and with what Cog reads from the source."""

import gc
import inspect
import json
import re
from pathlib import Path
from typing import Any

import cog
import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predict import METRICS, Predictor
from starling.errors import RequestError
from starling.openapi import Field, SignatureError, declared_concurrency, read_signature, render
from starling.request import MAX_STOP_SEQUENCES, OLD_NAMES, Request
from starling.service import GenerationResult, Service
from starling.settings import Settings

ROOT = Path(__file__).parent.parent
SIGNATURE = read_signature((ROOT / "predict.py").read_text())
INPUTS = {field.name: field for field in SIGNATURE.inputs}
NUMBERS = [field for field in SIGNATURE.inputs if field.schema["type"] in ("integer", "number")]


def bounds_of_request(name: str) -> dict[str, Any]:
    """ge and le of a request's field."""
    metadata = Request.model_fields[OLD_NAMES.get(name, name)].metadata
    return {key: getattr(m, key) for m in metadata for key in ("ge", "le") if hasattr(m, key)}


def test_inputs_are_the_request_s_fields_in_the_documented_order() -> None:
    order = """
        prompt system_prompt messages mode max_tokens min_tokens temperature top_p top_k min_p presence_penalty
        frequency_penalty repetition_penalty stop_sequences seed prompt_template max_new_tokens json_schema regex
    """
    assert " ".join(INPUTS) == " ".join(order.split())
    assert {OLD_NAMES.get(name, name) for name in INPUTS} == set(Request.model_fields)


def test_a_setup_that_fails_shows_its_traceback_and_leaves_time_to_read_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exiting(Predictor):
        def load_service(self, settings: Settings) -> Service:
            assert not gc.isenabled(), "what setup loads is not collected"
            raise SystemExit("no weights here")

    shown = []
    for name in ("configure_logs", "install_cancellation"):
        monkeypatch.setattr(f"predict.{name}", lambda: None)
    monkeypatch.setattr("time.sleep", lambda seconds: shown.append(capsys.readouterr().err))
    with pytest.raises(SystemExit):
        Exiting().setup()
    gc.unfreeze()
    (told,) = shown
    assert "Traceback" in told and "no weights here" in told


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_bounds_are_the_request_s(field: Field) -> None:
    assert {key: field.options[key] for key in ("ge", "le") if key in field.options} == bounds_of_request(field.name)


def test_defaults_are_the_request_s() -> None:
    nothing = Request.parse(prompt="a").model_dump() | {"prompt": "", "max_new_tokens": None, "stop_sequences": ""}
    defaults = {name: field.options["default"] for name, field in INPUTS.items()}
    assert defaults == nothing | {"messages": list(nothing["messages"])}
    assert Request.parse(**defaults | {"prompt": "a"}) == Request(prompt="a")


def test_choices_are_the_request_s() -> None:
    annotation = Request.model_fields["mode"].annotation
    assert tuple(INPUTS["mode"].options["choices"]) == annotation.__args__  # type: ignore[union-attr]


@pytest.mark.parametrize("field", SIGNATURE.inputs, ids=lambda field: field.name)
def test_descriptions_fit_the_form_and_the_bounds(field: Field) -> None:
    text = field.options["description"]
    assert 10 < len(text) <= 120
    assert text.endswith(".")
    for values in re.findall(r"(-?[\d.]+(?: and -?[\d.]+)*) (?:is|are) ", text):
        for value in map(float, values.split(" and ")):
            Request.parse(**{"prompt": "a", field.name: value})


@given(st.sampled_from(NUMBERS), st.data())
def test_the_form_and_the_request_accept_the_same_numbers(field: Field, data: st.DataObject) -> None:
    schema = json.loads((ROOT / "openapi.json").read_text())["components"]["schemas"]["Input"]["properties"][field.name]
    bounds = [value for key in ("minimum", "maximum") if (value := schema.get(key)) is not None]
    whole = schema["type"] == "integer"
    near = st.sampled_from(bounds).flatmap(lambda bound: st.sampled_from([bound - 1, bound, bound + 1]))
    anything = st.integers(-(2**40), 2**40) if whole else st.floats(-20, 20, allow_nan=False)
    value = data.draw(near | anything)
    in_form = jsonschema.Draft202012Validator(schema).is_valid(value)
    inputs = {"max_tokens": 8192, "max_new_tokens": None, "prompt": "a"} | {field.name: value}
    if field.name == "max_new_tokens":
        inputs["max_tokens"] = 512  # its default: not given
    try:
        Request.parse(**inputs)
    except RequestError:
        assert not in_form
    else:
        assert in_form


def test_openapi_json_is_made_from_the_signature() -> None:
    assert (ROOT / "openapi.json").read_text() == render(ROOT / "predict.py"), "run scripts/openapi"


def test_what_is_read_from_the_source_is_what_runs() -> None:
    parameters = inspect.signature(Predictor.predict).parameters
    assert list(parameters)[1:] == list(INPUTS)
    for name, field in INPUTS.items():
        info = parameters[name].default
        assert isinstance(info, cog.FieldInfo)
        assert {key: getattr(info, key) for key in field.options} == field.options
    assert SIGNATURE.streaming
    assert Predictor.predict.__cog_concurrent_max__ == SIGNATURE.concurrency  # type: ignore[attr-defined]
    assert declared_concurrency(ROOT / "predict.py") == SIGNATURE.concurrency


def test_every_metric_is_one_of_a_result() -> None:
    assert set(METRICS) == set(GenerationResult.__dataclass_fields__) - {"text"}


@pytest.mark.parametrize(
    ("signature", "fault"),
    [
        ("x: int = Input(default=2 * 3)", "computed"),
        ("x: int = Input(default=DEFAULT)", "computed"),
        ('x: str = Input(default="", description=f"at most {LIMIT}")', "computed"),
        ('x: str = Input(default="", description="a\\\\n")', "backslash"),
        ('x: str = Input(default="", description=("one "\n "two"))', "one line"),
        ("x: int = Input(ge=1)", "no default"),
        ("x: int", "needs a default"),
        ("x: int = 3", "not a plain Input"),
        ("x: int = cog.Input(default=3)", "not a plain Input"),
        ("x: tuple = Input(default=None)", "not supported"),
        ("x: int = Input(default=None)", "None"),
        ("x: int = Input(default=9, le=8)", "bounds"),
        ("x: int = Input(default=9, ge=10)", "bounds"),
        ('x: list[str] = Input(default=["a\\\\n"])', "backslash"),
        ("*, x: int = Input(default=9)", "needs a default"),
    ],
)
def test_what_cog_would_misread_is_refused(signature: str, fault: str) -> None:
    with pytest.raises(SignatureError, match=fault):
        read_signature(f"class Predictor:\n  def predict(self, {signature}) -> ConcatenateIterator[str]: ...")


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (
            "class Predictor:\n  @other(max=4)\n  def predict(self) -> ConcatenateIterator[str]: ...",
            "@other.* not read",
        ),
        ("class Predictor:\n  @concurrent(4)\n  def predict(self) -> ConcatenateIterator[str]: ...", "not read"),
        ("class Predictor:\n  def predict(self) -> str: ...", "ConcatenateIterator"),
        ("class Predictor:\n  def predict(self): ...", "ConcatenateIterator"),
        ("class Another:\n  def predict(self) -> ConcatenateIterator[str]: ...", "no class Predictor"),
    ],
)
def test_a_predictor_that_cog_would_misread_is_refused(source: str, fault: str) -> None:
    with pytest.raises(SignatureError, match=fault):
        read_signature(source)


def test_a_predictor_answers_one_at_a_time_and_whole_unless_it_says_more() -> None:
    signature = read_signature("class Predictor:\n  def predict(self) -> ConcatenateIterator[str]: ...")
    assert (signature.streaming, signature.concurrency) == (False, 1)


@pytest.mark.parametrize(
    ("max_tokens", "max_new_tokens", "used"), [(512, 7, 7), (7, 7, 7), (7, 7.0, 7), (9, None, 9), (512, 512, 512)]
)
def test_the_old_name_of_max_tokens(max_tokens: int, max_new_tokens: Any, used: int) -> None:
    assert Request.parse(prompt="a", max_tokens=max_tokens, max_new_tokens=max_new_tokens).max_tokens == used


def test_two_different_lengths_are_refused() -> None:
    with pytest.raises(RequestError, match=r"max_tokens is 9 and max_new_tokens, its old name, is 8"):
        Request.parse(prompt="a", max_tokens=9, max_new_tokens=8)


def test_a_list_of_stop_sequences_reaches_the_request_as_text() -> None:
    stops = [f"s{n}" for n in range(MAX_STOP_SEQUENCES)]
    for text in (json.dumps(stops), ",".join(stops)):
        assert Request.parse(prompt="a", stop_sequences=text).stop_sequences == tuple(stops)
