"""Every environment variable that this package reads, in one place. Read once, at start."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from starling.errors import StarlingError

Flag = Annotated[bool, BeforeValidator(lambda v: v.strip().lower() if isinstance(v, str) else v)]


class Settings(BaseModel):
    """How this process serves. Each field is read from the variable that its alias names."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    weights: Path | None = Field(None, alias="STARLING_WEIGHTS")  # a checkpoint folder; None: weights/ or a download
    device: Literal["auto", "cpu", "cuda"] = Field("auto", alias="STARLING_DEVICE")
    max_concurrency: int = Field(1, ge=1, alias="COG_MAX_CONCURRENCY")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Settings":
        """Raises StarlingError naming the variable, its value and the rule."""
        names = {field.alias for field in cls.model_fields.values() if field.alias}
        try:
            return cls.model_validate({name: environ[name] for name in names if environ.get(name, "") != ""})
        except ValidationError as error:
            faults = [f"{e['loc'][0]} is {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise StarlingError(f"Bad setting in the environment: {'; '.join(faults)}.") from None
