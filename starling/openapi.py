"""predict.py's source → the OpenAPI document that Cog makes of it and that Cog's server validates requests with.

`cog build` reads a predictor's signature without running it and writes .cog/openapi_schema.json into the image. Cog's
server needs that file for streaming and validation, but outside an image nothing creates it. This module reads the
source in the same way and builds the same document, for the types that Starling's predictor uses. It refuses what Cog
would silently drop or corrupt (a computed default, an f-string, a backslash in a description).

    python -m starling.openapi predict.py > openapi.json
"""

import ast
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starling.errors import StarlingError

COG_VERSION = "0.23.1"
JSON_TYPES: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "dict": {"type": "object"},
}
# Input's keyword → OpenAPI's
CONSTRAINTS = {"ge": "minimum", "le": "maximum", "min_length": "minLength", "max_length": "maxLength"}


class SignatureError(StarlingError):
    """predict.py's signature contains something that Cog would misread."""


@dataclass(frozen=True)
class Field:
    """One input, as declared by its annotation and its Input(...)."""

    name: str
    schema: dict[str, Any]  # of the type alone
    nullable: bool
    options: dict[str, Any]  # Input's keywords


@dataclass(frozen=True)
class Signature:
    """What Cog knows about a predictor."""

    inputs: tuple[Field, ...]
    streaming: bool
    concurrency: int  # @concurrent(max=...); 1 without it


def read_signature(source: str, class_name: str = "Predictor") -> Signature:
    """The signature of class_name.predict. Raises SignatureError naming the line."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for method in node.body:
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and method.name == "predict":
                    return _signature(method)
    raise SignatureError(f"no class {class_name} with a method predict was found. Define it at the module's top level")


def declared_concurrency(predictor: Path) -> int:
    """How many requests the predict.py at `predictor` takes at a time: COG_MAX_CONCURRENCY in its image."""
    return read_signature(predictor.read_text(encoding="utf-8")).concurrency


def _signature(method: ast.FunctionDef | ast.AsyncFunctionDef) -> Signature:
    if method.returns is None or ast.unparse(method.returns) != "ConcatenateIterator[str]":
        raise SignatureError(f"line {method.lineno}: predict must be annotated as returning ConcatenateIterator[str]")
    arguments = method.args.args[1:]  # without self
    if len(method.args.defaults) != len(arguments) or method.args.kwonlyargs:
        raise SignatureError(f"line {method.lineno}: every input needs a default, Input(default=...)")
    streaming, concurrency = False, 1
    for decorator in method.decorator_list:
        match decorator:
            case ast.Name("streaming"):
                streaming = True
            case ast.Call(ast.Name("concurrent"), [], [ast.keyword("max", ast.Constant(int(value)))]):
                concurrency = value
            case _:
                raise SignatureError(f"line {decorator.lineno}: @{ast.unparse(decorator)} is not read by Cog")
    fields = (_field(argument, default) for argument, default in zip(arguments, method.args.defaults, strict=True))
    return Signature(tuple(fields), streaming, concurrency)


def _field(argument: ast.arg, default: ast.expr) -> Field:
    match default:
        case ast.Call(ast.Name("Input"), [], keywords):
            options = {keyword.arg or "": _literal(keyword.value) for keyword in keywords}
        case _:
            raise SignatureError(f"line {default.lineno}: the default of {argument.arg} is not a plain Input(...) call")
    if "default" not in options:
        raise SignatureError(f"line {default.lineno}: {argument.arg} has no default; a request may leave any input out")
    _check_default(argument, options)
    annotation = ast.unparse(argument.annotation) if argument.annotation else ""
    required = annotation.removesuffix(" | None")
    schema = _schema(required)
    if schema is None:
        raise SignatureError(
            f"line {argument.lineno}: {argument.arg} is annotated {annotation!r}, which is not supported here"
        )
    nullable = annotation != required
    if options["default"] is None and not nullable:
        raise SignatureError(
            f"line {argument.lineno}: {argument.arg} has the default None, and Cog would require it. "
            f"Annotate it {annotation} | None"
        )
    return Field(argument.arg, schema, nullable, options)


def _check_default(argument: ast.arg, options: dict[str, Any]) -> None:
    """Cog does not check defaults against their bounds."""
    default = options["default"]
    if isinstance(default, int | float) and not options.get("ge", default) <= default <= options.get("le", default):
        raise SignatureError(f"line {argument.lineno}: the default of {argument.arg}, {default}, is outside its bounds")


def _schema(annotation: str) -> dict[str, Any] | None:
    if annotation.startswith("list[") and annotation.endswith("]"):
        items = _schema(annotation[len("list[") : -1])
        return items and {"type": "array", "items": items}
    return JSON_TYPES.get("dict" if annotation.startswith("dict[") else annotation)


def _literal(node: ast.expr) -> Any:
    """The value of a literal that Cog would read the same way."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise SignatureError(
            f"line {node.lineno}: {ast.unparse(node)} is computed; Cog would drop it. Write the literal"
        ) from None
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and (node.end_lineno != node.lineno or ast.unparse(node).count("\\")):
            raise SignatureError(
                f"line {node.lineno}: Cog copies a string as it stands between its quotes. "
                "Write one literal on one line, without a backslash"
            )
    return value


def _property(order: int, field: Field) -> dict[str, Any]:
    prop: dict[str, Any] = {"x-order": order, "default": field.options["default"]}
    if "choices" in field.options:
        prop["allOf"] = [{"$ref": f"#/components/schemas/{field.name}"}]
    else:
        prop |= {"title": " ".join(word[:1].upper() + word[1:] for word in field.name.split("_")), **field.schema}
    if field.nullable:
        prop["nullable"] = True
    for key in ("description", "deprecated"):
        if field.options.get(key):
            prop[key] = field.options[key]
    return prop | {new: field.options[old] for old, new in CONSTRAINTS.items() if old in field.options}


def _json_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _titled(title: str, **schema: Any) -> dict[str, Any]:
    return {"title": title, **schema}


def build_document(signature: Signature) -> dict[str, Any]:
    """The OpenAPI 3.0.2 document that `cog build` writes for this signature."""
    text = {"type": "string"}
    moment = {"type": "string", "format": "date-time"}
    ok = {"description": "Successful Response"}
    anything = {"200": ok | _json_body({})}
    invalid = {"422": {"description": "Validation Error"} | _json_body(_ref("HTTPValidationError"))}
    choices = {
        field.name: _titled(
            field.name, description="An enumeration.", enum=field.options["choices"], type=field.schema["type"]
        )
        for field in signature.inputs
        if "choices" in field.options
    }
    properties = {field.name: _property(order, field) for order, field in enumerate(signature.inputs)}
    schemas = {
        "Input": _titled("Input", type="object", properties=properties),
        "Output": _titled("Output", type="array", items=text)
        | {"x-cog-array-type": "iterator", "x-cog-array-display": "concatenate"},
        **choices,
        "PredictionRequest": _titled(
            "PredictionRequest", type="object", properties={"id": _titled("Id", **text), "input": _ref("Input")}
        ),
        "PredictionResponse": _titled(
            "PredictionResponse",
            type="object",
            properties={
                "input": _ref("Input"),
                "output": _ref("Output"),
                "id": _titled("Id", **text),
                "version": _titled("Version", **text),
                "created_at": _titled("Created At", **moment),
                "started_at": _titled("Started At", **moment),
                "completed_at": _titled("Completed At", **moment),
                "status": _titled("Status", **text),
                "error": _titled("Error", **text),
                "logs": _titled("Logs", **text),
                "metrics": _titled("Metrics", type="object"),
            },
        ),
        "Status": _titled(
            "Status",
            description="An enumeration.",
            enum=["starting", "processing", "succeeded", "canceled", "failed"],
            **text,
        ),
        "HTTPValidationError": _titled(
            "HTTPValidationError",
            type="object",
            properties={"detail": _titled("Detail", type="array", items=_ref("ValidationError"))},
        ),
        "ValidationError": _titled(
            "ValidationError",
            required=["loc", "msg", "type"],
            type="object",
            properties={
                "loc": _titled("Location", type="array", items={"anyOf": [text, {"type": "integer"}]}),
                "msg": _titled("Message", **text),
                "type": _titled("Error Type", **text),
            },
        ),
    }
    predict: dict[str, Any] = {
        "summary": "Predict",
        "description": "Run a single prediction on the model",
        "operationId": "predict_predictions_post",
        "requestBody": _json_body(_ref("PredictionRequest")),
        "responses": {"200": ok | _json_body(_ref("PredictionResponse"))} | invalid,
    }
    if signature.streaming:
        predict |= {"x-cog-streaming": True}
    cancel = {
        "summary": "Cancel",
        "operationId": "cancel_predictions__prediction_id__cancel_post",
        "parameters": [
            {"required": True, "schema": _titled("Prediction Id", **text), "name": "prediction_id", "in": "path"}
        ],
        "responses": anything | invalid,
    }
    paths = {
        "/": {"get": {"summary": "Root", "operationId": "root__get", "responses": anything}},
        "/health-check": {
            "get": {"summary": "Healthcheck", "operationId": "healthcheck_health_check_get", "responses": anything}
        },
        "/predictions": {"post": predict},
        "/predictions/{prediction_id}/cancel": {"post": cancel},
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": COG_VERSION},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def render(predictor: Path) -> str:
    """The document for a predictor's file, as JSON text."""
    signature = read_signature(predictor.read_text(encoding="utf-8"))
    return json.dumps(build_document(signature), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render(Path(sys.argv[1])))
