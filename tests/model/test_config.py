"""config.json: what is not implemented is refused by name, every fault at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from starling.errors import CheckpointError
from starling.model.config import ModelConfig
from tests.model.tiny import CONFIG

AWQ = CONFIG["quantization_config"]
STARLING: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "quantization_config": AWQ | {"group_size": 128},
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32002,
}


def test_starlings_own() -> None:
    config = ModelConfig.from_dict(STARLING)
    assert (config.head_dim, config.q_size, config.kv_size) == (128, 4096, 1024)
    assert (config.sliding_window, config.eos_token_ids, config.group_size) == (4096, (32000,), 128)


def test_a_llama_has_no_window_whatever_its_file_says() -> None:
    assert ModelConfig.from_dict(STARLING | {"architectures": ["LlamaForCausalLM"]}).sliding_window is None


def test_transformers_5_writes_rope_parameters() -> None:
    raw = {k: v for k, v in STARLING.items() if k != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": 5e5}
    assert ModelConfig.from_dict(raw | {"rope_parameters": rope}).rope_theta == 5e5


@pytest.mark.parametrize("architecture", ["Mistral", "Llama"])
@pytest.mark.parametrize(
    "left_out", ["sliding_window", "num_key_value_heads", "head_dim", "rope_theta", "tie_word_embeddings"]
)
def test_a_key_left_out_means_what_it_means_to_transformers(architecture: str, left_out: str) -> None:
    raw = {key: value for key, value in STARLING.items() if key != left_out}
    config = ModelConfig.from_dict(raw | {"architectures": [f"{architecture}ForCausalLM"]})
    del raw["quantization_config"]
    oracle = getattr(transformers, f"{architecture}Config").from_dict(raw)
    window = oracle.sliding_window if architecture == "Mistral" else None
    assert config.sliding_window == window
    assert (config.num_key_value_heads, config.head_dim) == (oracle.num_key_value_heads, oracle.head_dim)
    assert config.rope_theta == oracle.rope_parameters["rope_theta"]
    assert config.tie_word_embeddings == oracle.tie_word_embeddings


def test_transformers_5_writes_awq_s_version_as_format() -> None:
    quantization = {key: value for key, value in STARLING["quantization_config"].items() if key != "version"}
    raw = STARLING | {"quantization_config": quantization | {"format": "gemm", "version": None, "backend": "auto"}}
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(STARLING)
    with pytest.raises(CheckpointError, match=r"quantization_config\.version is 'gemv'"):
        ModelConfig.from_dict(STARLING | {"quantization_config": quantization | {"format": "gemv"}})


def test_autoawq_writes_its_version_in_capitals_too() -> None:
    quantization = STARLING["quantization_config"] | {"version": "GEMM"}
    assert ModelConfig.from_dict(STARLING | {"quantization_config": quantization}) == ModelConfig.from_dict(STARLING)


def test_the_head_is_never_converted() -> None:
    quantization = STARLING["quantization_config"] | {"modules_to_not_convert": ["lm_head"]}
    assert ModelConfig.from_dict(STARLING | {"quantization_config": quantization}) == ModelConfig.from_dict(STARLING)


@pytest.mark.parametrize("quantization", [None, {"quant_method": "gptq", "bits": 4, "group_size": 128}])
def test_a_checkpoint_that_is_not_awq_is_reported_once(quantization: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(STARLING | {"quantization_config": quantization})
    assert str(caught.value).count("quantization_config") == 1
    assert "python -m starling quantize" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architectures"),
        ({"architectures": 7}, "architectures is 7"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"quantization_config": "awq"}, "quantization_config is 'awq'"),
        ({"quantization_config": AWQ | {"bits": 8}}, "bits is 8"),
        ({"quantization_config": AWQ | {"version": "gemv"}}, "version is 'gemv'"),
        ({"quantization_config": AWQ | {"zero_point": False}}, "zero_point is False"),
        ({"quantization_config": AWQ | {"group_size": 16}}, "group_size is 16"),
        ({"quantization_config": AWQ | {"group_size": -1}}, "group_size is -1"),
        ({"quantization_config": AWQ | {"modules_to_not_convert": ["lm_head", "mlp"]}}, "modules_to_not_convert"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"num_attention_heads": [32]}, "num_attention_heads is [32]"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"num_key_value_heads": 5}, "are not divisible"),
        ({"intermediate_size": 14337}, "intermediate_size 14337"),
        ({"hidden_size": 4160}, "hidden_size 4160 is not divisible"),
        ({"head_dim": 66}, "q_size 2112 is not divisible"),
        ({"head_dim": 4, "num_key_value_heads": 1}, "kv_size 4 is not divisible by 8"),
        ({"head_dim": 127}, "head_dim 127 is odd"),
        ({"eos_token_id": 32002}, "token id 32002"),
        ({"eos_token_id": [32000, -1]}, "token id -1"),
        ({"bos_token_id": 32003}, "token id 32003"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match="not implemented") as caught:
        ModelConfig.from_dict(STARLING | change)
    assert named in str(caught.value)


def test_all_faults_at_once() -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(STARLING | {"hidden_act": "gelu", "mlp_bias": True, "architectures": ["X"]})
    assert all(name in str(caught.value) for name in ("gelu", "mlp_bias", "'X'"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "missing"), ("{", "JSON"), ("[]", "list"), ("\xff", "JSON"),
        pytest.param("[" * 100_000, "JSON", id="deep"), pytest.param("9" * 5000, "JSON", id="long"),
    ],
)  # fmt: skip
def test_files_at_fault(tmp_path: Path, content: str | None, named: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_folder(tmp_path)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(STARLING))
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(STARLING)
