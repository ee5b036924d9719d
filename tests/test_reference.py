"""The second engine against ours: the same tokens, the same guarantees for stops, seeds, streaming and cancelling."""

import itertools
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.parity import our_logits
from starling.engine.engine import TokenStream
from starling.engine.sampling import uniform
from starling.engine.sequence import SamplingParams
from starling.errors import EngineStoppedError, GenerationCancelled, RequestError, StarlingError
from starling.model.mistral import Mistral
from starling.model.ops import choose_ops
from starling.model.ops.reference import ReferenceOps
from starling.reference import ReferenceEngine
from starling.reference_sampling import processors
from starling.request import Request
from starling.service import Service, load_engine
from starling.settings import Settings
from tests.model.tiny import write_checkpoint
from tests.waiting import HANG_S, wait_for

EXACT = Settings(cpu_precision="float32", kv_dtype="float32", max_concurrency=4, device="cpu")


@pytest.fixture(scope="module")
def service(demo_folder: Path) -> Iterator[Service]:
    service = Service.from_folder(demo_folder, Settings(engine="reference", device="cpu"))
    yield service
    service.close()


def ask(service: Service, **fields: Any) -> Any:
    return service.answer(Request.parse(**{"temperature": 0, "max_tokens": 32, **fields}))


def tokens_of(stream: TokenStream) -> tuple[list[int], str]:
    tokens: list[int] = []
    while True:
        delivery = stream.get(timeout_s=120)
        assert delivery is not None and delivery.error is None
        tokens += delivery.tokens
        if delivery.finish is not None:
            return tokens, delivery.finish


SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.01},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.2},
    {"min_tokens": 8},
]


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "LlamaForCausalLM"])
def test_both_engines_choose_the_same_tokens(tmp_path: Path, architecture: str) -> None:
    """Greedy and sampled, with penalties and filters, past a sliding window, which a Llama must ignore.

    Where two answers diverge, each engine must have chosen by its own logits, and those must be equal except for
    float32's last digits.
    """
    seed = torch.seed() % 2**32
    print(f"seed {seed}")
    torch.manual_seed(seed)
    tied = architecture == "LlamaForCausalLM"
    config = write_checkpoint(tmp_path, architectures=[architecture], tie_word_embeddings=tied, sliding_window=24)
    ours, reference = load_engine(tmp_path, EXACT), ReferenceEngine.from_folder(tmp_path, EXACT)
    model = Mistral.load(tmp_path, choose_ops("cpu", None, "float32", "float32"))
    for i, kind in enumerate(SAMPLED):
        prompt = torch.randint(3, config.vocab_size, (40,)).tolist()
        params = SamplingParams(max_tokens=12, stop_ids=frozenset({2}), seed=i, **kind)
        answers = [tokens_of(engine.submit(prompt, params))[0] for engine in (ours, reference)]
        same = [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*answers, strict=False))]
        logits = [our_logits(model, prompt, same), reference.logits(prompt + same)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
        if answers[0] != answers[1]:
            ids = torch.tensor([prompt + same])
            for found, answer in zip(logits, answers, strict=True):
                chosen = processors(len(prompt), params, None)(ids, found[None].clone()).argmax().item()
                assert [chosen] == answer[len(same) :][:1], (kind, answers)
    ours.close()
    reference.close()


@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(0.001, 5) | st.sampled_from([5e-324, 1e-40]),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.5),
)
def test_transformers_processors_draw_what_our_sampler_draws(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    torch.manual_seed(seed)
    logits, ids = 4 * torch.randn(1, 50), torch.randint(50, (1, 7))
    params = SamplingParams(1, frozenset(), seed, 0, temperature, top_p, top_k, min_p)
    drawn = processors(7, params, None)(ids, logits.clone()).argmax(dim=-1)

    def column(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    ours = ReferenceOps().sample(
        logits, column(temperature), torch.tensor([top_k]), column(top_p), column(min_p), column(uniform(seed, 7))
    )
    # Or the token is at the threshold of a filter or of the draw, within float32's precision.
    p = (logits[0].double() / temperature).softmax(dim=-1)
    assert drawn.tolist() == ours.tolist() or (p[drawn] - p[ours]).abs() < 1e-5 or on_an_edge(p, top_p, min_p)


def on_an_edge(p: torch.Tensor, top_p: float, min_p: float) -> bool:
    kept = p[p >= min_p * p.max() * (1 - 1e-5)].sort(descending=True).values
    past = kept.cumsum(0) / kept.sum()
    near = (past - top_p).abs().min() < 1e-5 or (p / p.max() - min_p).abs().min() < 1e-5
    return bool(near)


def test_an_answer_with_its_metrics(service: Service) -> None:
    result = ask(service, prompt="What is the capital of France?")
    assert (result.text, result.finish_reason) == ("The capital of France is Paris.", "stop")
    assert (result.input_token_count, result.output_token_count, result.cached_token_count) == (19, 7, 0)
    assert service.healthy and service.occupancy["waiting"] == 0


def test_stops_minimum_and_length(service: Service) -> None:
    france = "What is the capital of France?"
    assert ask(service, prompt=france, stop_sequences=["France is"]).text == "The capital of "
    assert ask(service, prompt=france, max_tokens=3).finish_reason == "length"
    assert ask(service, prompt=france, min_tokens=20).output_token_count >= 20


def test_a_seed_repeats_an_answer(service: Service) -> None:
    fields = {"prompt": "Tell me a story.", "temperature": 1, "max_tokens": 12}
    first = ask(service, **fields)
    assert ask(service, **fields, seed=first.seed).text == first.text


def test_an_answer_follows_its_grammar(service: Service) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    answer = ask(service, prompt="Say x.", json_schema=json.dumps(schema | {"additionalProperties": False}))
    jsonschema.validate(json.loads(answer.text), schema)
    short = ask(service, prompt="Yes or no?", regex="yes|no", min_tokens=20)
    assert short.text in ("yes", "no") and short.output_token_count < 5, "min_tokens cannot hold past the grammar's end"
    with pytest.raises(RequestError, match="grammar failed"):
        ask(service, prompt="x", json_schema='{"$ref": "#"}')


def test_cancelling_frees_the_engine_for_waiting_requests(service: Service) -> None:
    first = service.generate(Request.parse(prompt="Count.", min_tokens=2000, max_tokens=2000))
    second = service.generate(Request.parse(prompt="Count.", min_tokens=2000, max_tokens=2000))
    next(first)
    second.cancel()  # while it waits
    first.cancel()  # while it runs
    for generation in (first, second):
        with pytest.raises(GenerationCancelled):
            list(generation)
    assert ask(service, prompt="Hi", max_tokens=1).output_token_count == 1


def test_a_request_that_cannot_run_is_refused(service: Service) -> None:
    with pytest.raises(RequestError, match="8192"):
        service.generate(Request.parse(prompt="word " * 9000))


@pytest.mark.parametrize("fault", [torch.AcceleratorError("an illegal memory access was encountered"), SystemExit()])
def test_a_lost_device_or_a_dead_thread_ends_everything(tmp_path: Path, fault: BaseException) -> None:
    write_checkpoint(tmp_path)
    engine = ReferenceEngine.from_folder(tmp_path, EXACT)
    both_wait = threading.Event()

    def breaks(*inputs: Any) -> None:
        both_wait.wait()
        raise fault

    engine._model.register_forward_pre_hook(breaks)
    streams = [engine.submit([5, 6], SamplingParams(8, frozenset(), 0)) for _ in range(2)]
    both_wait.set()
    for stream in streams:
        last = stream.get(timeout_s=120)
        assert last is not None and isinstance(last.error, EngineStoppedError)
        assert "Restart the container" in str(last.error)
    with pytest.raises(EngineStoppedError):
        engine.submit([5], SamplingParams(1, frozenset(), 0))
    assert not engine.healthy


def test_a_request_that_fails_ends_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    engine = ReferenceEngine.from_folder(tmp_path, EXACT)

    def breaks(*inputs: Any) -> None:
        raise RuntimeError("a secret of the step")

    hook = engine._model.register_forward_pre_hook(breaks)
    last = engine.submit([5, 6], SamplingParams(8, frozenset(), 0)).get(timeout_s=120)
    assert last is not None
    assert str(last.error) == "The request failed: RuntimeError. The server is still running; try again."
    hook.remove()
    assert len(tokens_of(engine.submit([5, 6], SamplingParams(8, frozenset(), 0)))[0]) == 8
    assert engine.healthy
    engine.close()


def test_while_a_step_hangs_it_is_unhealthy_and_refuses_requests(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    engine = ReferenceEngine.from_folder(tmp_path, EXACT.model_copy(update={"hang_after_s": 0.05}))
    ends = threading.Event()
    hook = engine._model.register_forward_pre_hook(lambda *inputs: ends.wait(HANG_S) and None)
    stream = engine.submit([5, 6], SamplingParams(3, frozenset(), 0))
    wait_for(lambda: not engine.healthy)
    with pytest.raises(EngineStoppedError, match="hangs in a step"):
        engine.submit([5], SamplingParams(1, frozenset(), 0))
    hook.remove()
    ends.set()
    assert len(tokens_of(stream)[0]) == 3
    wait_for(lambda: engine.healthy)
    engine.close()


def test_closing_ends_every_request(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    engine = ReferenceEngine.from_folder(tmp_path, EXACT)
    streams = [engine.submit([5, 6], SamplingParams(1000, frozenset(), 0)) for _ in range(2)]
    assert streams[0].get(timeout_s=120) is not None
    engine.close()
    for stream in streams:
        last = None
        while last is None or last.finish is None:
            last = stream.get(timeout_s=120)
        assert isinstance(last.error, EngineStoppedError)
    with pytest.raises(EngineStoppedError):
        engine.submit([5], SamplingParams(1, frozenset(), 0))
    assert not engine.healthy


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    monkeypatch.setitem(sys.modules, "starling.reference", None)
    with pytest.raises(StarlingError, match=r"requirements-reference\.txt"):
        load_engine(tmp_path, Settings(engine="reference"))
