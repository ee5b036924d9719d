"""Text in, text out, on the small real model: the README's examples, stops, seeds, grammars, and how chunks are cut."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest

from starling import tokenizer_json
from starling.engine.engine import Delivery, TokenStream
from starling.engine.sequence import SamplingParams
from starling.errors import CheckpointError, DeviceError, GenerationCancelled, NoRoomError, RequestError
from starling.generation import Generation, GenerationResult
from starling.model.memory import activation_bytes
from starling.model.ops.cpu import CpuOps
from starling.request import Request
from starling.service import Service, load_engine
from starling.settings import Settings
from starling.tokenizer import IncrementalDecoder, Tokenizer, byte_alphabet
from tests.model.tiny import write_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def service(demo_folder: Path) -> Iterator[Service]:
    service = Service.from_folder(demo_folder, Settings(max_concurrency=4))
    yield service
    service.close()


def ask(service: Service, **fields: Any) -> Any:
    return service.answer(Request.parse(**{"temperature": 0, "max_tokens": 48, **fields}))


FRANCE = "What is the capital of France?"


def test_the_readmes_examples_run(demo_folder: Path, service: Service) -> None:
    """They are sampled, but the printed seed gives the same answer here."""
    code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"STARLING_WEIGHTS": str(demo_folder), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (shown,) = re.findall(r"GenerationResult\(text=.*, seed=\d+\)", done.stdout)
    result = eval(shown, {"GenerationResult": GenerationResult})
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    same = service.answer(Request.parse(messages=turns, prompt="How are you today?", max_tokens=64, seed=result.seed))
    assert same.text == result.text
    for name in ("finish_reason", "input_token_count", "output_token_count"):
        assert getattr(same, name) == getattr(result, name)
    first_and_streamed, third = done.stdout.split(shown)
    assert first_and_streamed.endswith(f"\n{result.text}\n")
    assert third.startswith("\n") and third.endswith("\n")


EXITS_MID_ANSWER = """
import atexit
import os
from starling.request import Request
from starling.service import Service
from starling.settings import Settings

atexit.register(lambda: print("still running" if service.healthy else "closed"))  # runs after what is registered later
service = Service.load(Settings.from_env(os.environ))
answers = [service.generate(Request.parse(prompt="Hello", min_tokens=2000, max_tokens=2000)) for _ in range(4)]
next(answers[0])
"""


@pytest.mark.parametrize("engine", ["engine", "reference"])
def test_a_process_that_exits_mid_answer_shuts_down_cleanly(demo_folder: Path, engine: str) -> None:
    environment = {"STARLING_WEIGHTS": str(demo_folder), "COG_MAX_CONCURRENCY": "4", "HOME": str(Path.home())}
    environment |= {"STARLING_ENGINE": engine}
    command = [sys.executable, "-c", EXITS_MID_ANSWER]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "closed\n"


def test_an_answer_and_its_metrics(service: Service) -> None:
    result = ask(service, prompt=FRANCE, seed=0)
    assert result.text == "The capital of France is Paris."
    assert (result.finish_reason, result.output_token_count, result.seed) == ("stop", 7, 0)
    assert result.input_token_count == 19
    assert result.time_to_first_token > 0 and result.tokens_per_second > 0
    before = service.counters
    ask(service, prompt=FRANCE)
    assert service.counters.steps > before.steps


def test_a_blank_seed_is_drawn_and_reported(service: Service) -> None:
    fields = {"prompt": "Tell me a story.", "temperature": 1, "max_tokens": 20}
    first = ask(service, **fields)
    assert ask(service, **fields, seed=first.seed).text == first.text
    assert len({ask(service, **fields).seed for _ in range(3)}) == 3


def test_a_stop_sequence_ends_the_answer_and_is_not_part_of_it(service: Service) -> None:
    result = ask(service, prompt=FRANCE, stop_sequences=["France is", "nce is P"])
    assert (result.text, result.finish_reason) == ("The capital of ", "stop_sequence")


def test_min_tokens_delays_stop_sequences_and_the_end(service: Service) -> None:
    assert ask(service, prompt=FRANCE, min_tokens=20).output_token_count >= 20
    late = ask(service, prompt=FRANCE, min_tokens=4, stop_sequences=["capital"])
    assert late.text.startswith("The capital of France")


def test_max_tokens(service: Service) -> None:
    result = ask(service, prompt=FRANCE, max_tokens=3)
    assert (result.text, result.finish_reason, result.output_token_count) == ("The capital of", "length", 3)


def test_the_next_turn_finds_the_first_in_the_cache(service: Service) -> None:
    story = "Tell me about the city of Paris, its rivers, its museums and its trains, in a few words."
    first = ask(service, prompt=story, max_tokens=16)
    turns = [{"role": "user", "content": story}, {"role": "assistant", "content": first.text}]
    second = ask(service, messages=turns, prompt="And of Lyon?", max_tokens=4)
    assert second.cached_token_count >= 16
    assert second.cached_token_count < second.input_token_count


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "size": {"enum": ["small", "large"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["city", "size", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1, 5])
def test_an_answer_follows_its_schema(service: Service, temperature: float) -> None:
    fields = {"temperature": temperature, "json_schema": json.dumps(SCHEMA), "max_tokens": 300}
    generations = [service.generate(Request.parse(prompt="Describe Paris.", **fields)) for _ in range(2)]
    free = service.generate(Request.parse(prompt=FRANCE, temperature=0))  # in the same batch, unconstrained
    assert "".join(free) == "The capital of France is Paris."
    for generation in generations:
        jsonschema.validate(json.loads("".join(generation)), SCHEMA)


def test_an_answer_matches_its_regex(service: Service) -> None:
    result = ask(service, prompt="When?", regex=r"(19|20)\d\d-[01]\d/[0-3]\d", temperature=2)
    assert re.fullmatch(r"(19|20)\d\d-[01]\d/[0-3]\d", result.text)
    short = ask(service, prompt="Yes or no?", regex="yes|no", min_tokens=20)
    assert short.text in ("yes", "no") and short.output_token_count < 5, "min_tokens does not outlast the grammar's end"


@pytest.mark.parametrize("min_tokens", [0, 20])
def test_a_grammar_that_fails_ends_no_answer_as_if_it_were_complete(service: Service, min_tokens: int) -> None:
    """When llguidance discovers only while computing the mask that no token is possible, it allows the end."""
    with pytest.raises(RequestError, match=r"grammar failed.*Fix"):
        ask(service, prompt="x", json_schema='{"$ref": "#"}', min_tokens=min_tokens)


@pytest.mark.parametrize(
    ("regex", "answer"),
    [
        (r"^(yes|no)$", "yes|no"),
        (r"^a|b\\$", r"a|b\\"),
        (r"^\$", r"\$"),
        (r"\^[$]", r"\^\$"),
        ("^yes$|^no$", "yes|no"),
        ("(?i)^(yes|no)$", "(?i:yes|no)"),
        (r"\Ayes\z", "yes"),
        ("(?x)yes # no/", "yes"),
        ("(?x)\n  yes  # agreed\n  | no", "yes|no"),
        (r"a/b|\\/|\/", r"a/b|\\/|/"),
    ],
)
def test_anchors_and_comments_change_nothing(service: Service, regex: str, answer: str) -> None:
    for seed in range(3):
        result = ask(service, prompt="Yes or no?", regex=regex, temperature=5, seed=seed)
        assert re.fullmatch(answer, result.text)
        assert result.finish_reason == "stop"


ARGUMENTS = {
    "type": "object",
    "properties": {f"arg{i}": {"type": "number"} if i % 2 else {"type": "string", "maxLength": 200} for i in range(8)},
    "required": ["arg0", "arg1"],
    "additionalProperties": False,
}


def list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 20}


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"properties": {"name": {"const": f"tool{i}"}, "arguments": ARGUMENTS}} for i in range(120)]},
        {"properties": {str(i): {"type": "integer"} for i in range(1500)}, "required": list(map(str, range(1500)))},
        {"properties": {str(i): {} for i in range(300)}},
        {"type": "string", "enum": [f"value {i}" for i in range(2000)]},
        {"patternProperties": {f"^{i:02}.*$": {"multipleOf": 0.25} for i in range(16)}},
        *(
            list_of({"type": "integer", "multipleOf": multiple, **bounds})
            for multiple, bounds in [
                (86400, {}),
                (86400, {"exclusiveMinimum": 0}),
                (99990, {"minimum": 1}),
                (3600, {"minimum": 0, "maximum": 365 * 86400}),
                (4096, {"maximum": 1 << 40}),
                (28800, {"minimum": -86400, "maximum": 86400}),
            ]
        ),
        {"properties": {str(i): {"multipleOf": i} for i in (86400, 3600, 1024, 7)}, "required": ["86400", "7"]},
    ],
)
def test_a_large_schema_can_be_followed(service: Service, schema: dict[str, Any]) -> None:
    # One seed: of 900 random texts under the first schema, two ended at llguidance's limit of items.
    result = ask(service, prompt="x", json_schema=json.dumps(schema), temperature=5, max_tokens=60, seed=1)
    assert result.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("grammar", "fault"),
    [
        ({"regex": "((a{1000}){1000}){1000}"}, "too many states"),
        ({"regex": "(.*[a-m].{60}[n-z]){3}"}, "too many expressions"),
        # With llguidance's default limits, these two would continue.
        ({"regex": "(.*a.{40}b.*){3}", "min_tokens": 500}, "too many states"),
        (
            {
                "json_schema": json.dumps(
                    {"anyOf": [list_of({"type": "array", "items": {"const": i}}) for i in range(700)]}
                )
            },
            "many items",
        ),
    ],
    ids=["compiling", "lexer's fuel", "lexer's states", "parser's items"],
)
def test_a_grammar_that_grows_without_bound_ends_its_request_alone(
    service: Service, grammar: dict[str, Any], fault: str
) -> None:
    other = service.generate(Request.parse(prompt=FRANCE, temperature=0))
    with pytest.raises(RequestError, match=fault) as error:
        ask(service, prompt="x", temperature=5, seed=0, max_tokens=1000, **grammar)
    assert "<state>" not in str(error.value)
    assert "".join(other) == "The capital of France is Paris."


def contains(count: int) -> list[dict[str, str]]:
    """Schemas of strings that contain `count` different pieces. Each one doubles the time and memory to join them."""
    return [{"type": "string", "pattern": f"a{i}"} for i in range(count)]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"json_schema": '{"items":' * 6000 + "{}" + "}" * 6000}, "not JSON|recursion limit"),  # 3.13 reads it
        ({"json_schema": "[" * 32000 + "]" * 32000}, "not JSON|give an object"),  # 3.14 reads even this
        ({"json_schema": '{"const": ' + "[" * 32000 + "]" * 32000 + "}"}, "not JSON|recursion limit"),
        ({"regex": "(" * 20000 + "a" + ")" * 20000}, "regex"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": '{"const": ' + "1" * 5000 + "}"}, "not JSON"),
        ({"json_schema": "[]"}, "give an object"),
        ({"json_schema": '{"type": "animal"}'}, "animal"),
        ({"json_schema": '{"not": {}}'}, "not"),
        ({"json_schema": json.dumps({"properties": {str(i): {} for i in range(3000)}})}, "grammar size"),
        (
            {"json_schema": json.dumps({"patternProperties": {f"^{i}": {} for i in range(500)}})},
            "500 patterns.*most 16",
        ),
        ({"json_schema": '{"items": {"multipleOf": 999983}}'}, "multipleOf.*more than 100000"),
        ({"json_schema": '{"allOf": [{"multipleOf": 997}, {"multipleOf": 0.991}]}'}, "multipleOf.*more than 100000"),
        ({"json_schema": '{"prefixItems": [{"multipleOf": 50021}, {"multipleOf": 50023}]}'}, "more than 100000"),
        ({"json_schema": '{"multipleOf": 1e308, "items": {"multipleOf": 3e307}}'}, "more than 100000"),
        ({"json_schema": json.dumps({"allOf": contains(28)})}, "28 different patterns .* most 16"),
        (
            {"json_schema": json.dumps({"allOf": [{"properties": {"a": each}} for each in contains(28)]})},
            "28 different",
        ),
        (
            {
                "json_schema": json.dumps(
                    {
                        "$ref": "#/$defs/0",
                        "$defs": {
                            str(i): {"$ref": f"#/$defs/{(i + 1) % 28}"} | each for i, each in enumerate(contains(28))
                        },
                    }
                )
            },
            "28 different",
        ),
        ({"json_schema": json.dumps({"pattern": r"\p{L}{0,50}" * 1500})}, "16500 bytes.*most 16384"),
        ({"json_schema": json.dumps({"patternProperties": {"a{0,50}" * 2500: {}}})}, "17500 bytes.*most 16384"),
        ({"regex": "(a"}, r"followed: unclosed group in the regex \(a\. Fix"),
        ({"regex": "a\n(b"}, r"followed: unclosed group\. Fix"),
        ({"regex": "a^b"}, r"followed: \^ and \$ may stand only at its ends .* in the regex a\^b\. Fix"),
        ({"regex": r"\bb"}, r"followed: .* \\b nowhere, in the regex \\bb\. Fix"),
        ({"regex": "a\\"}, r"a backslash at the end of a line.*Write"),
        ({"json_schema": '{"pattern": "(a"}'}, r"followed: unclosed group in the regex \(a\. Fix"),
        (
            {"json_schema": '{"pattern": "a(?=b)"}'},
            r"followed: look-around, .* not supported in the regex a\(\?=b\)\. Fix",
        ),
        ({"json_schema": '{"const": NaN}'}, "not finite"),
        ({"json_schema": '{"maximum": 1e400}'}, "not finite"),
        ({"regex": "\ud800"}, "lone surrogate"),
        ({"json_schema": '{"const": "\ud800"}'}, "json_schema"),
        ({"prompt": "word " * 9000}, r"8192"),
    ],
)
def test_what_cannot_run_is_refused_at_once(service: Service, fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(RequestError, match=fault):
        service.generate(Request.parse(**{"prompt": "x", **fields}))


def test_what_is_too_long_is_refused_before_its_grammar_is_compiled(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service._grammars, "constraint", lambda _: pytest.fail("the grammar was compiled"))
    with pytest.raises(NoRoomError):
        service.generate(Request.parse(prompt=FRANCE, max_tokens=8192, regex="yes|no"))


def test_a_submitted_request_ends_if_its_caller_never_gets_it(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled while being handed over, when nobody else holds its stream."""
    streams: list[TokenStream] = []

    def cancelled(stream: TokenStream, *_: object) -> None:
        streams.append(stream)
        raise KeyboardInterrupt  # like Cog's CancelationException, not an Exception

    monkeypatch.setattr("starling.service.Generation", cancelled)
    with closing(Service.from_folder(demo_folder, Settings())) as service:
        with pytest.raises(KeyboardInterrupt):
            service.generate(Request.parse(prompt="Hello", min_tokens=2000, max_tokens=2000))
        (stream,) = streams
        while (delivery := stream.get(timeout_s=60)) is not None and delivery.finish is None:
            pass
        assert delivery is not None and delivery.finish == "cancelled"
        assert (service.occupancy["running"], service.occupancy["waiting"]) == (0, 0)


def test_cancelling_ends_iteration_with_an_error(service: Service) -> None:
    generation = service.generate(Request.parse(prompt="Count.", min_tokens=2000, max_tokens=2000))
    next(generation)
    generation.cancel()
    with pytest.raises(GenerationCancelled):
        list(generation)
    assert generation.result is None


def test_the_first_token_comes_at_once_and_later_ones_together(demo_folder: Path) -> None:
    """The stream is fed by hand: what arrives while a chunk is being read comes out as one chunk."""
    tokenizer = Tokenizer.from_folder(demo_folder, 49152)
    stream = TokenStream(lambda: None)
    generation = Generation(stream, IncrementalDecoder(tokenizer), Request.parse(prompt="x"), 1, seed=0)
    words = tokenizer.encode(" one two three four five")
    stream.put(Delivery(words[:1]))
    assert next(generation) == "one"
    for word in words[1:]:
        stream.put(Delivery([word]))
    assert next(generation) == " two three four five"
    stream.put(Delivery([2], "stop"))
    assert list(generation) == []
    assert generation.result is not None and generation.result.text == "one two three four five"


@pytest.mark.parametrize("how", ["by the engine", "by a stop sequence"])
def test_an_end_is_not_held_back_with_the_text(demo_folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Chunks are an hour apart here, but a reader waiting for the next one sees the end when it comes."""
    monkeypatch.setattr("starling.generation.COALESCE_S", 3600.0)
    tokenizer = Tokenizer.from_folder(demo_folder, 49152)
    stream = TokenStream(lambda: None)
    request = Request.parse(prompt="x", stop_sequences=[] if how == "by the engine" else ["three"])
    generation = Generation(stream, IncrementalDecoder(tokenizer), request, 1, seed=0)
    words = tokenizer.encode(" one two three")
    stream.put(Delivery(words[:1]))
    assert next(generation) == "one"
    with ThreadPoolExecutor() as pool:
        rest = pool.submit(list, generation)
        for word in words[1:]:
            stream.put(Delivery([word]))
        if how == "by the engine":
            stream.put(Delivery([2], "stop"))
    assert rest.result() == [" two three" if how == "by the engine" else " two "]


def test_characters_split_across_tokens_come_out_whole(demo_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(demo_folder, 49152)
    stream = TokenStream(lambda: None)
    text = "日本語 🦊\n    indented\n\ttab"
    tokens = tokenizer.encode(" " + text)
    for token in tokens:
        stream.put(Delivery([token]))
    stream.put(Delivery([], "length"))
    generation = Generation(stream, IncrementalDecoder(tokenizer), Request.parse(prompt="x"), 1, seed=0)
    assert "".join(generation) == text


@pytest.mark.parametrize(("finish", "end"), [("length", ""), ("stop", "\N{REPLACEMENT CHARACTER}")])
def test_a_character_cut_off_by_the_length_limit_is_left_out(
    demo_folder: Path, finish: Literal["stop", "length"], end: str
) -> None:
    tokenizer = Tokenizer.from_folder(demo_folder, 49152)
    stream = TokenStream(lambda: None)
    stream.put(Delivery([*tokenizer.encode(" a fox 🦊")[:-1], *([2] if finish == "stop" else [])], finish))
    generation = Generation(stream, IncrementalDecoder(tokenizer), Request.parse(prompt="x"), 1, seed=0)
    assert "".join(generation) == "a fox " + end
    assert generation.result is not None and generation.result.text == "a fox " + end


def test_a_stop_sequence_stops_the_engine_before_the_last_chunk_is_read(demo_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(demo_folder, 49152)
    cancelled: list[bool] = []
    stream = TokenStream(lambda: cancelled.append(True))
    stream.put(Delivery(tokenizer.encode(" one two three")))
    request = Request.parse(prompt="x", stop_sequences=["three"])
    generation = Generation(stream, IncrementalDecoder(tokenizer), request, 1, seed=0)
    assert next(generation) == "one two "
    assert cancelled


def test_a_model_of_another_chat_format_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path)
    controls = {f"<|reserved_{i}|>": 256 + i for i in range(70)}
    tokenizer_json.write(tokenizer_json.byte_level(byte_alphabet() | controls, [], controls), tmp_path)
    monkeypatch.setattr("starling.service.load_engine", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(CheckpointError, match=r"no token '<\|end_of_turn\|>'.* and 62 more\. Only models with Open"):
        Service.from_folder(tmp_path)


def test_a_kv_cache_that_does_not_fit_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    monkeypatch.setattr("starling.service.kv_cache_room", lambda device, step_bytes: 50_000)
    with pytest.raises(DeviceError, match=r"STARLING_KV_CACHE_BYTES is 60000\. .* room for 50000\. Lower it"):
        load_engine(tmp_path, Settings(kv_cache_bytes=60_000, max_concurrency=256))
    load_engine(tmp_path, Settings(kv_cache_bytes=50_000, max_concurrency=256)).close()


def test_the_kv_cache_has_what_its_settings_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = write_checkpoint(tmp_path)
    block = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 16 * 2
    )  # bytes of 16 positions in float16
    for fields, blocks in (
        ({"max_concurrency": 2}, 2 * (1024 // 16 + 1)),  # a whole context for each, and the block that is written next
        ({"max_concurrency": 1, "block_size": 32}, 1024 // 32 + 1),
        ({"kv_cache_bytes": 1 << 40}, 1024 // 16 + 1),  # no more is allocated than can be used
        ({"kv_cache_bytes": 10 * block - 1}, 9),
        ({"kv_cache_bytes": block}, 1),
        ({"kv_cache_bytes": 10 * block, "kv_dtype": "float32", "cpu_precision": "float32", "device": "cpu"}, 5),
    ):
        caplog.clear()
        engine = load_engine(tmp_path, Settings.model_validate(fields))
        assert engine.occupancy["kv_blocks"] == blocks, fields
        size = fields.get("block_size", 16)
        assert (f"the KV cache holds {blocks * size} of the 1024 tokens" in caplog.text) == (blocks <= 10)
        if blocks > 10:
            engine.check([5] * 1000, 24)  # a whole context has room
        engine.close()
    assert list(tmp_path.glob("packed-*-head16.bin")), "the output projection is kept as precisely as was asked for"
    with pytest.raises(DeviceError, match=rf"one block of 16 positions needs {block}.*raise STARLING_KV_CACHE_BYTES"):
        load_engine(tmp_path, Settings(kv_cache_bytes=block - 1))


def test_memory_for_the_largest_step_is_left_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_checkpoint(tmp_path)
    left: list[int] = []

    def room(device: object, step_bytes: int) -> int:
        left.append(step_bytes)
        return 1 << 20

    for name in ("kv_cache_budget", "kv_cache_room"):  # the latter checks what the operator set
        monkeypatch.setattr(f"starling.service.{name}", room)
    settings = Settings(device="cpu", prefill_tokens=64, max_concurrency=3, speculative_rows=5)
    for set_by_hand in ({}, {"kv_cache_bytes": 1 << 20}):
        load_engine(tmp_path, settings.model_copy(update=set_by_hand)).close()
    assert left == [activation_bytes(config, 64 + 3 + 5)] * 2


def test_steps_are_as_large_as_their_settings_say(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    by_default = CpuOps(1).prefill_tokens
    for rows, tokens, steps in ((8, 256, 1), (0, 16, 3), (0, None, -(-48 // by_default))):
        engine = load_engine(tmp_path, Settings(device="cpu", threads=1, speculative_rows=rows, prefill_tokens=tokens))
        for max_tokens in (1, 30):
            params = SamplingParams(max_tokens=max_tokens, stop_ids=frozenset(), seed=0)
            stream = engine.submit([5, 6, 7, 8] * 12, params)
            while (delivery := stream.get()) and delivery.finish is None:
                pass
            assert max_tokens > 1 or engine.counters.steps == steps
        engine.close()
        assert bool(engine.counters.proposed) == bool(rows)


def test_a_whole_context_fits_in_the_blocks_of_its_window(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, sliding_window=300)
    engine = load_engine(tmp_path, Settings(kv_cache_bytes=300_000))  # 48 blocks of 16 positions
    engine.check([5] * 1000, 24)
    with pytest.raises(NoRoomError, match="1024"):
        engine.check([5] * 1000, 25)
    engine.close()


class Recorder:
    """A stand-in for the engine: records the sampling parameters, and answers nothing."""

    prompt: list[int]
    params: SamplingParams

    def check(self, prompt: list[int], max_tokens: int) -> None: ...

    def submit(self, prompt: list[int], params: SamplingParams, constraint: object = None) -> TokenStream:
        self.prompt, self.params = prompt, params
        return TokenStream(lambda: None)


def test_the_engine_is_asked_for_what_the_request_says(demo_folder: Path) -> None:
    tokenizer, engine = Tokenizer.from_folder(demo_folder, 49152), Recorder()
    fields = {
        "max_tokens": 9, "min_tokens": 3, "temperature": 0.25, "top_p": 0.5, "top_k": 6, "min_p": 0.125, "seed": 0,
        "presence_penalty": -0.5, "frequency_penalty": 0.75, "repetition_penalty": 1.5,
    }  # fmt: skip
    service = Service(engine, tokenizer, bos=1, stop_ids=frozenset({7}))  # type: ignore[arg-type]
    service.generate(Request.parse(prompt="x", **fields))
    assert asdict(engine.params) == fields | {"stop_ids": {7, tokenizer.token_id("<|end_of_turn|>")}}


def test_a_prompt_begins_and_an_answer_ends_as_the_checkpoint_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, bos_token_id=256, eos_token_id=7)
    controls = {"<s>": 256, "<|end_of_turn|>": 257}
    tokenizer_json.write(tokenizer_json.byte_level(byte_alphabet() | controls, [], controls), tmp_path)
    engine = Recorder()
    monkeypatch.setattr("starling.service.load_engine", lambda *_: engine)
    Service.from_folder(tmp_path).generate(Request.parse(prompt="x"))
    assert engine.prompt[0] == 256
    assert engine.params.stop_ids == {7, 257}


def test_the_start_line_says_what_is_served(demo_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="starling")
    source = "https://user:secret@mirror.example"
    settings = Settings(weights=demo_folder, weights_source=source, device="cpu", threads=1)
    service = Service.load(settings)
    answer = service.answer(Request.parse(prompt="My secret is out.", max_tokens=2))
    for grammar in ({"regex": "yes|no"}, {"json_schema": '{"enum": ["secret"]}'}):
        service.answer(Request.parse(prompt="My secret is out.", max_tokens=2, **grammar))
    service.close()
    assert not service.healthy
    lines = [json.loads(record.message) for record in caplog.records if record.message.startswith("{")]
    (start,) = [line for line in lines if line["event"] == "start"]
    assert start["stand_in"] is True and start["weights"] == str(demo_folder)
    assert "1 threads" in start["operations"]
    *_, request, constrained, also_constrained = [line for line in lines if line["event"] == "request"]
    assert (request["outcome"], request["output_tokens"], request["constrained"]) == ("length", 2, False)
    assert (request["input_tokens"], request["seed"]) == (answer.input_token_count, answer.seed)
    assert request["first_token_s"] == round(answer.time_to_first_token, 4)
    assert constrained["constrained"] and also_constrained["constrained"]
    assert constrained["cached_tokens"] >= 16 > request["cached_tokens"]
    assert "secret" not in caplog.text
