"""Every environment variable that this package reads, in one place. Read once, at start."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from starling.errors import StarlingError

logger = logging.getLogger(__name__)

PREFIX = "STARLING_"
Flag = Annotated[bool, BeforeValidator(lambda v: v.strip() if isinstance(v, str) else v)]
# pydantic does not convert text to one of a Literal's numbers.
BlockSize = Annotated[Literal[16, 32], BeforeValidator(lambda v: int(v) if v in ("16", "32") else v)]


class Settings(BaseModel):
    """How this process serves. Each field is read from the environment variable that its alias names."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    weights: Path | None = Field(None, alias="STARLING_WEIGHTS")  # a checkpoint folder; None: weights/ or a download
    allow_download: Flag = Field(False, alias="STARLING_ALLOW_DOWNLOAD")  # download missing weights at start
    weights_source: str | None = Field(None, alias="STARLING_WEIGHTS_SOURCE")  # a mirror's URL or a folder, for the hub
    device: Literal["auto", "cpu", "cuda"] = Field("auto", alias="STARLING_DEVICE")
    # "reference": transformers and AutoAWQ instead of our engine; needs requirements-reference.txt
    engine: Literal["engine", "reference"] = Field("engine", alias="STARLING_ENGINE")
    # CPU threads; None: the cores it may use. Bounded: 100,000 would kill the process before it could say why.
    threads: int | None = Field(None, ge=1, le=1024, alias="STARLING_THREADS")
    # How a CPU rounds activations; see CpuOps. auto: prompts to 8 bits, answers to 16.
    cpu_precision: Literal["auto", "int8", "int16", "float32"] = Field("auto", alias="STARLING_CPU_PRECISION")
    kv_dtype: Literal["float16", "float32"] = Field("float16", alias="STARLING_KV_DTYPE")
    # Requests that Cog accepts at a time; the engine runs as many concurrently.
    max_concurrency: int = Field(1, ge=1, le=256, alias="COG_MAX_CONCURRENCY")
    kv_cache_bytes: int | None = Field(None, ge=1, alias="STARLING_KV_CACHE_BYTES")  # None: by free memory
    block_size: BlockSize = Field(16, alias="STARLING_BLOCK_SIZE")  # positions in a KV block
    # Prompt tokens in one step; None: 16 to 64 a thread, at most 256, on a CPU (Ops.prefill_tokens); 512 on a GPU
    prefill_tokens: int | None = Field(None, ge=16, le=8192, alias="STARLING_PREFILL_TOKENS")
    speculative_rows: int = Field(8, ge=0, le=256, alias="STARLING_SPECULATIVE_ROWS")  # 0: no speculative decoding
    # A step that takes longer counts as hung. At most what Python can wait: closing waits this long for the engine.
    hang_after_s: float = Field(120.0, gt=0, le=threading.TIMEOUT_MAX, alias="STARLING_HANG_AFTER_S")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Settings":
        """Raises StarlingError naming the variable, its value and the rule. Warns of unknown STARLING_ variables."""
        names = {field.alias for field in cls.model_fields.values() if field.alias}
        # Not refused: Kubernetes sets variables named after its services (such as STARLING_PORT) in every container.
        if unknown := sorted(name for name in environ if name.startswith(PREFIX) and name not in names):
            logger.warning("Ignored unknown settings: %s", ", ".join(unknown))
        try:
            return cls.model_validate({name: environ[name] for name in names if environ.get(name, "") != ""})
        except ValidationError as error:
            faults = [f"{e['loc'][0]} is {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise StarlingError(f"Bad setting in the environment: {'; '.join(faults)}.") from None
