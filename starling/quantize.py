"""A full-precision Mistral or Llama checkpoint → AWQ files (4 bits, version GEMM), by AutoAWQ's own algorithm.

AutoAWQ searches scales and clips on what calibration texts make the layers see (Lin et al. 2023). Its package does
that; reading, calibration tokens and writing are ours, so that the files are exactly what this project reads.
"""

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from starling.chat import END_OF_TURN, Chat
from starling.dense import DenseWeights, empty_model, loaded_model
from starling.errors import CheckpointError, StarlingError
from starling.model.checkpoint import expected_tensors, open_checkpoint
from starling.model.config import GROUP_SIZES, ModelConfig
from starling.model.memory import free_bytes
from starling.request import Request
from starling.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BUILT_IN_TEXTS = Path(__file__).with_name("calibration.jsonl")
# Of the free memory, the weights may take this share; the rest is for calibration.
WEIGHTS_SHARE = 0.7


def quantize(
    source: Path,
    out: Path,
    group_size: int = 128,
    texts: Path = BUILT_IN_TEXTS,
    blocks: int = 128,
    block_length: int = 512,
    clip: bool = True,
) -> None:
    """Write `source`, quantized, into the new folder `out`, which appears when it is complete.

    `texts`: plain text, or JSON Lines of conversations ({"mode": …, "messages": […]}). At most `blocks` blocks of
    `block_length` tokens of it are used. Raises StarlingError.
    """
    if out.exists():
        raise StarlingError(f"{out} exists already; name a new folder.")
    weights = DenseWeights(source)
    if weights.quantized:
        raise CheckpointError(f"{source} is quantized already; quantizing needs the full-precision model.")
    raw = weights.raw_config | {"quantization_config": _quantization(group_size), "torch_dtype": "float16"}
    config = ModelConfig.from_dict(raw, source=str(source / "config.json"))
    tokenizer = Tokenizer.from_folder(source, config.vocab_size)
    calibration = _blocks(_conversation_ids(texts, tokenizer, config), blocks, block_length)
    logger.info("Calibrating on %d blocks of %d tokens", len(calibration), len(calibration[0]))
    model = loaded_model(DenseWeights(source, _dtype(weights)))
    _run_autoawq(model, weights.architecture, group_size, calibration, clip)
    _write(model, config, raw, source, out)


def _quantization(group_size: int) -> dict[str, object]:
    if group_size not in GROUP_SIZES:
        raise StarlingError(f"The group size is {group_size}; it must be one of {GROUP_SIZES}.")
    return {"bits": 4, "group_size": group_size, "quant_method": "awq", "version": "gemm", "zero_point": True}


def _dtype(weights: DenseWeights) -> torch.dtype:
    """float32 on a CPU that can hold it; else float16, as AutoAWQ does."""
    size = 4 * empty_model(weights).num_parameters()
    if torch.cuda.is_available() or size > WEIGHTS_SHARE * free_bytes(torch.device("cpu")):
        return torch.float16
    return torch.float32


def _conversation_ids(path: Path, tokenizer: Tokenizer, config: ModelConfig) -> Iterator[list[int]]:
    """Every text of the file as the model would see it, control tokens included."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StarlingError(f"The calibration texts cannot be read: {error}.") from error
    if path.suffix != ".jsonl":
        yield [config.bos_token_id, *tokenizer.encode(content)]
        return
    end = tokenizer.token_id(END_OF_TURN)
    chat = Chat(tokenizer, config.bos_token_id, end)
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            conversation = json.loads(line)
            *earlier, last = conversation["messages"]
            request = Request.parse(mode=conversation.get("mode", "chat"), messages=earlier)
            answer = " " + last["content"].strip()
        except (ValueError, KeyError, TypeError) as error:
            raise StarlingError(f"{path}, line {number} is no conversation: {error}.") from error
        yield [*chat.prompt_ids(request), *tokenizer.encode(answer), end]


def _blocks(texts: Iterator[list[int]], count: int, length: int) -> list[list[int]]:
    """The texts end to end, cut into equal blocks; one shorter block if there is not enough for one."""
    ids: list[int] = []
    for text in texts:
        ids += text
        if len(ids) >= count * length:
            break
    whole = min(count, len(ids) // length)
    if len(ids) < 2:
        raise StarlingError("The calibration texts are empty.")
    return [ids[i * length : (i + 1) * length] for i in range(whole)] or [ids]


def _run_autoawq(
    model: PreTrainedModel, architecture: str, group_size: int, calibration: list[list[int]], clip: bool
) -> None:
    """Replace the model's linears by quantized ones, in place."""
    try:
        with warnings.catch_warnings(record=True):  # it announces its own end of life at import
            from awq.models import LlamaAWQForCausalLM, MistralAWQForCausalLM
    except ImportError as error:
        raise StarlingError(
            f"AutoAWQ's {error.name} is not installed. "
            "Run: pip install --no-build-isolation -r requirements-reference.txt"
        ) from error
    made_of = {"LlamaForCausalLM": LlamaAWQForCausalLM, "MistralForCausalLM": MistralAWQForCausalLM}
    wrapper = made_of[architecture](
        model, model.config.model_type, is_quantized=False, config=model.config, quant_config=None, processor=None
    )
    wrapper.quantize(
        quant_config={"w_bit": 4, "q_group_size": group_size, "zero_point": True, "version": "GEMM"},
        calib_data=calibration,
        max_calib_samples=len(calibration),
        max_calib_seq_len=len(calibration[0]),
        n_parallel_calib_samples=8,
        apply_clip=clip,
    )


def _write(model: PreTrainedModel, config: ModelConfig, raw: dict[str, object], source: Path, out: Path) -> None:
    state = model.state_dict()
    tensors = {}
    for name, (dtype, _) in expected_tensors(config).items():
        wanted = torch.int32 if dtype == "I32" else torch.float16
        tensors[name] = state[name].to("cpu", wanted).contiguous()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as partial:
        folder = Path(partial) / out.name
        folder.mkdir()
        for path in source.iterdir():  # the tokenizer and its like
            if path.is_file() and path.suffix in (".json", ".model", ".jinja") and "safetensors" not in path.name:
                shutil.copy(path, folder)
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)  # save_file leaves it readable to its owner alone
        with open_checkpoint(folder, config):
            pass  # it is what the engine asks for
        folder.rename(out)
