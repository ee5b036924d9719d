"""config.json, read with types. What is not implemented is refused by name before anything is loaded."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from starling.errors import PYTHON, CheckpointError
from starling.json_file import read_json_object

ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM")
GROUP_SIZES = (32, 64, 128)
# Defaults for keys that a Mistral's config.json leaves out (from transformers' MistralConfig).
MISTRAL_WINDOW, MISTRAL_KV_HEADS = 4096, 8


class ModelConfig(BaseModel):
    """Shapes and constants of one checkpoint.

    Fields carry the names of Hugging Face's config.json; sizes are in elements, positions in tokens.
    """

    model_config = ConfigDict(frozen=True)

    architecture: str
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt
    rms_norm_eps: float
    rope_theta: float
    sliding_window: PositiveInt | None
    tie_word_embeddings: bool
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    group_size: int

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `folder`/config.json. Raises CheckpointError when it is missing, damaged or not implemented."""
        return cls.from_dict(read_config(folder), source=str(folder / "config.json"))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> "ModelConfig":
        """`raw`: the parsed config.json. Raises CheckpointError listing every fault at once."""
        faults: list[str] = []

        def require(holds: bool, fault: str) -> None:
            if not holds:
                faults.append(fault)

        architectures = raw.get("architectures")
        architecture = architectures[0] if isinstance(architectures, list) and architectures else None
        require(
            architecture in ARCHITECTURES,
            f"architectures is {architectures!r}; implemented: {', '.join(ARCHITECTURES)}",
        )
        require(raw.get("hidden_act") == "silu", f"hidden_act is {raw.get('hidden_act')!r}; implemented: 'silu'")
        require(not raw.get("attention_bias"), "attention_bias is set; biases are not implemented")
        require(not raw.get("mlp_bias"), "mlp_bias is set; biases are not implemented")

        # transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling.
        rope_key = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
        rope = raw.get(rope_key) or {}
        if not isinstance(rope, dict):
            faults.append(f"{rope_key} is {rope!r}, not an object")
            rope = {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        require(rope_type == "default", f"rope type is {rope_type!r}; implemented: 'default' (no scaling)")
        rope_theta = raw.get("rope_theta", rope.get("rope_theta", 10000.0))

        group_size, found = _group_size(raw.get("quantization_config"))
        faults += found

        mistral = architecture == "MistralForCausalLM"
        heads = raw.get("num_attention_heads") or 0
        kv_heads = raw.get("num_key_value_heads", MISTRAL_KV_HEADS if mistral else None) or heads
        hidden = raw.get("hidden_size") or 0
        sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden}
        odd = [f"{key} is {size!r}, not a whole number" for key, size in sizes.items() if not isinstance(size, int)]
        if odd:
            faults += odd
            heads = kv_heads = hidden = 0
        if heads and kv_heads and hidden:
            require(heads % kv_heads == 0, f"{heads} attention heads are not divisible by {kv_heads} key/value heads")
        eos = raw.get("eos_token_id")
        fields = {
            "architecture": architecture,
            "num_key_value_heads": kv_heads,
            "head_dim": raw.get("head_dim") or (hidden // heads if heads else 0),
            "rope_theta": rope_theta,
            # transformers' Llama has no sliding window, whatever its config.json says.
            "sliding_window": raw.get("sliding_window", MISTRAL_WINDOW) if mistral else None,
            "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,),
            "group_size": group_size,
        }
        plain = (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
            "max_position_embeddings", "rms_norm_eps", "bos_token_id",
        )  # fmt: skip
        missing = [key for key in plain if raw.get(key) is None]
        require(not missing, f"keys are missing: {', '.join(missing)}")
        if not faults:
            try:
                config = cls(**fields, **{key: raw[key] for key in plain})
            except ValidationError as error:
                faults += [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            else:
                faults += config._shape_faults()
                if not faults:
                    return config
        raise CheckpointError(f"{source} describes a model that is not implemented: {'; '.join(faults)}.")

    def _shape_faults(self) -> list[str]:
        faults = []
        for name in ("hidden_size", "intermediate_size", "q_size"):
            size = getattr(self, name)
            if size % self.group_size:
                faults.append(f"{name} {size} is not divisible by the group size {self.group_size}")
        if self.kv_size % 8:
            faults.append(f"kv_size {self.kv_size} is not divisible by 8")
        if self.head_dim % 2:
            faults.append(f"head_dim {self.head_dim} is odd")
        for token in (self.bos_token_id, *self.eos_token_ids):
            if not 0 <= token < self.vocab_size:
                faults.append(f"token id {token} is outside the embedding table of {self.vocab_size} rows")
        return faults


def read_config(folder: Path) -> dict[str, Any]:
    """`folder`/config.json, parsed. Raises CheckpointError when it is missing, damaged or not an object."""
    return read_json_object(folder / "config.json")


def _group_size(quantization: Any) -> tuple[int | None, list[str]]:
    """The group size in config.json's quantization_config, and the faults of that section."""
    if not isinstance(quantization, dict) or str(quantization.get("quant_method")).lower() != "awq":
        return None, [
            f"quantization_config is {quantization!r}; implemented: AWQ, with quant_method 'awq'. "
            f"`{PYTHON} -m starling quantize` makes an AWQ checkpoint from a full-precision one"
        ]
    faults = []
    # transformers 5 writes `format`; earlier versions and AutoAWQ wrote `version`, sometimes in capitals.
    version = quantization.get("version") or quantization.get("format")
    found = {**quantization, "version": version.lower() if isinstance(version, str) else version}
    for key, value in {"version": "gemm", "bits": 4, "zero_point": True}.items():
        if found.get(key) != value:
            faults.append(f"quantization_config.{key} is {found.get(key)!r}; implemented: {value!r}")
    group_size = quantization.get("group_size")
    if group_size not in GROUP_SIZES:
        faults.append(f"quantization_config.group_size is {group_size!r}; implemented: {GROUP_SIZES}")
    if (skipped := quantization.get("modules_to_not_convert")) not in (None, [], ["lm_head"]):  # never converted
        faults.append(f"quantization_config.modules_to_not_convert is {skipped!r}; implemented: none or ['lm_head']")
    return group_size, faults
