"""AutoAWQ's search (Lin et al. 2023), one layer in memory at a time, so that a 7B model does not need 30 GB."""

import functools
import hashlib
import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from starling.dense import DenseWeights, empty_model, load_module
from starling.errors import CheckpointError
from starling.model.config import ModelConfig
from starling.quantize.calibration import calibration_blocks
from starling.quantize.partial_folder import PartialFolder, fingerprint
from starling.tokenizer import Tokenizer

with warnings.catch_warnings(record=True):  # AutoAWQ warns of its own deprecation on import
    from awq.models._config import AwqConfig
    from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
    from awq.quantize import quantizer as autoawq
    from awq.utils.utils import get_best_device

# Samples that run through a layer at once; bounds the memory of its activations.
PARALLEL_SAMPLES = 8


class LayerwiseQuantizer(autoawq.AwqQuantizer):  # type: ignore[misc]
    """An AwqQuantizer that loads each layer when its turn comes and stores it when it is done.

    A layer's input is the output of the full-precision layers before it, so a resumed run only recomputes those.
    """

    modules: Any  # the layers that AutoAWQ's loop goes through

    def __init__(self, *args: Any, weights: DenseWeights, partial: PartialFolder, **kwargs: Any) -> None:
        self._weights = weights
        self._partial = partial
        self._channel_scales: dict[str, torch.Tensor] = {}  # found so far in the current layer
        super().__init__(*args, **kwargs)

    def init_quant(self, n_samples: int = 128, max_seq_len: int = 512) -> Any:
        load_module(self.model, "model.embed_tokens.", self._weights)
        load_module(self.model, "model.layers.0.", self._weights)
        modules, kwargs, inputs = super().init_quant(n_samples, max_seq_len)
        if kwargs.get("attention_mask") is not None:  # past a sliding window; without padding, all blocks share one
            kwargs["attention_mask"] = kwargs["attention_mask"][:1]
        return modules, kwargs, inputs

    def quantize(self) -> None:
        layers = self.modules
        autoawq.tqdm = lambda items, **_: items  # its own bar would count one layer at a time
        for index in tqdm(range(len(layers)), desc="Quantizing", unit="layer"):
            prefix = f"model.layers.{index}."
            load_module(self.model, prefix, self._weights)
            if self._partial.has_layer(index):
                self._get_input_feat(layers[index].to(get_best_device()), {})
            else:
                self.modules = [layers[index]]
                self._channel_scales.clear()
                super().quantize()
                found = {prefix + name: scales for name, scales in self._channel_scales.items()}
                self._partial.save_layer(index, _stored(prefix, layers[index]), found)
            layers[index].to("meta")

    def _search_best_scale(self, *args: Any, **kwargs: Any) -> Any:
        """AutoAWQ's search; keeps its result, the factors that divide a module's outputs."""
        name, linears, scales = super()._search_best_scale(*args, **kwargs)
        self._channel_scales[name] = scales
        return name, linears, scales

    def _compute_best_scale(
        self, x: torch.Tensor, w_mean: torch.Tensor, x_mean: torch.Tensor, module2inspect: torch.nn.Module, *args: Any
    ) -> torch.Tensor:
        """AutoAWQ's search, with a real copy of the weights that it tries scales on.

        It saves `tensor.cpu()` of each weight, to restore it after each try. On a CPU that is the weight itself, which
        the first try changes for good: the resulting model is ruined, without an error.
        """
        kept = {name: tensor.clone() for name, tensor in module2inspect.state_dict().items()}
        module2inspect.state_dict = lambda: kept  # type: ignore[method-assign,assignment]
        try:
            scales: torch.Tensor = super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *args)
        finally:
            del module2inspect.state_dict
        return scales

    @torch.no_grad()
    def _compute_best_clip(
        self,
        w: torch.Tensor,
        input_feat: torch.Tensor,
        n_grid: int = 20,
        max_shrink: float = 0.5,
        n_sample_token: int = 512,
    ) -> torch.Tensor:
        """AutoAWQ's search for the range to clip each group to, computed from the inputs' second moments.

        It minimises the mean over tokens of (x · d)², where d is the change of a group's weights. That is dᵀ E[x xᵀ] d:
        a product of small matrices per group, where AutoAWQ sums over all tokens for every candidate.
        w: [out, in], input_feat: [..., in] → [out, groups, 1]
        """
        size = self.group_size if self.group_size > 0 else w.shape[1]
        x = input_feat.view(-1, input_feat.shape[-1])
        x = x[:: max(1, x.shape[0] // n_sample_token)].to(w.device, torch.float32)
        x = x.view(x.shape[0], -1, size).transpose(0, 1)  # [groups, tokens, size]
        moments = x.transpose(1, 2) @ x / x.shape[1]  # [groups, size, size]
        groups = w.view(w.shape[0], -1, size)
        widest = groups.abs().amax(dim=-1, keepdim=True)  # [out, groups, 1]
        best, least = widest.clone(), torch.full_like(widest, torch.inf, dtype=torch.float32)
        for step in range(int(max_shrink * n_grid)):
            limit = widest * (1 - step / n_grid)
            rounded = self.pseudo_quantize_tensor(groups.clamp(-limit, limit).view(w.shape))[0]
            change = (rounded.view(groups.shape) - groups).to(torch.float32).transpose(0, 1)  # [groups, out, size]
            error = ((change @ moments) * change).sum(dim=-1, keepdim=True).transpose(0, 1)  # [out, groups, 1]
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, limit, best)
        return best


def quantize(source: Path, out: Path, text: str, group_size: int, samples: int, length: int) -> dict[str, torch.Tensor]:
    """Quantize the checkpoint in `source` into the new folder `out`; run again after an interruption, it resumes.

    Returns the channel scales that the search chose, by module name: a module's outputs were divided by them, and the
    columns of the linears that read those outputs multiplied. Uses the first GPU if there is one. Raises StarlingError.
    """
    weights = DenseWeights(source, torch.float16 if torch.cuda.is_available() else torch.float32)
    if weights.quantized:
        raise CheckpointError(f"{source} is quantized already. Name the full-precision checkpoint that it came from.")
    raw_config = _awq_config(weights, group_size)
    config = ModelConfig.from_dict(raw_config, source=str(source / "config.json"))
    tokenizer = Tokenizer.from_folder(source, config.vocab_size)
    context = config.max_position_embeddings
    blocks = calibration_blocks(text, tokenizer, config.bos_token_id, samples, length, context)
    plan = {
        "source": fingerprint(source),
        "group_size": group_size,
        "blocks": hashlib.sha256(repr(blocks).encode()).hexdigest(),
        "dtype": str(weights.dtype),
        "autoawq": importlib.metadata.version("autoawq"),
    }
    partial = PartialFolder(out, plan)
    model = empty_model(weights)
    model.config.use_cache = False
    wrapper = AWQ_CAUSAL_LM_MODEL_MAP[model.config.model_type](
        model, model.config.model_type, False, model.config, AwqConfig(), None
    )
    wrapper.quantize(
        tokenizer=None,
        quant_config={"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"},
        calib_data=blocks,
        n_parallel_calib_samples=PARALLEL_SAMPLES,
        max_calib_samples=len(blocks),
        max_calib_seq_len=length,
        quantizer_cls=functools.partial(LayerwiseQuantizer, weights=weights, partial=partial),
    )
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [] if config.tie_word_embeddings else ["lm_head.weight"]
    return partial.finish(source, raw_config, {name: weights[name].half() for name in names})


def _awq_config(weights: DenseWeights, group_size: int) -> dict[str, Any]:
    raw = {key: value for key, value in weights.raw_config.items() if key not in ("dtype", "_name_or_path")}
    return raw | {
        "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "modules_to_not_convert": None,
        },
    }


def _stored(prefix: str, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The layer's tensors as the checkpoint holds them."""
    return {
        prefix + name: tensor.cpu() if tensor.dtype == torch.int32 else tensor.cpu().half()
        for name, tensor in layer.state_dict().items()
    }
