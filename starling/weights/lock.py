"""The lock: which files of which revision are the weights, and how to recognise each of them."""

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from starling.errors import WeightsError

UNKNOWN = "unknown"
# Formats that hold data only. PyTorch's own (.bin, .pt, .pth, .ckpt) are pickles and can run code when they are loaded.
SAFE_SUFFIXES = (".safetensors", ".json")


def _safe_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.name != name or name.startswith(".") or "\\" in name:
        raise ValueError(f"{name!r} is not a plain file name; folders and hidden files are refused")
    if path.suffix not in SAFE_SUFFIXES:
        raise ValueError(f"{name!r} is refused: only {' and '.join(SAFE_SUFFIXES)} files, which hold no code, are read")
    return name


def _known(value: Any) -> Any:
    if value is None:
        raise ValueError(f'is null; write "{UNKNOWN}" for what is not known yet')
    return None if value == UNKNOWN else value


def _shown(value: Any) -> Any:
    return UNKNOWN if value is None else value


# None stands for "unknown": the first download determines it, for review.
_Size = Annotated[Annotated[int, Field(gt=0)] | None, BeforeValidator(_known), PlainSerializer(_shown)]
_Sha256 = Annotated[
    Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None, BeforeValidator(_known), PlainSerializer(_shown)
]


class LockedFile(BaseModel):
    """One file of the repository."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, AfterValidator(_safe_name)]
    size: _Size  # bytes
    sha256: _Sha256


class Lock(BaseModel):
    """The files of one repository at one commit. Frozen; `filled` makes a new one."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    repository: Annotated[str, Field(pattern=r"^[\w-][\w.-]*/[\w-][\w.-]*$")]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]  # a commit: branches and tags can move
    licence: Annotated[str, Field(min_length=1)]
    files: Annotated[tuple[LockedFile, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> "Lock":
        names = [file.name for file in self.files]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"files are named twice: {', '.join(twice)}")
        if not any(name.endswith(".safetensors") for name in names):
            raise ValueError("no .safetensors file is named")
        return self

    @classmethod
    def read(cls, path: Path) -> "Lock":
        """Raises a WeightsError that lists every fault."""
        try:
            text = path.read_text(encoding="utf-8")
            json.loads(text, object_pairs_hook=_refuse_repeated_keys)
            return cls.model_validate_json(text)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc'])) or 'lock'}: {e['msg']}" for e in error.errors(include_url=False)]
            raise WeightsError(f"{path} is not a lock: {'; '.join(faults)}.") from None
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} cannot be read as a lock: {error}.") from error

    def filled(self, found: dict[str, tuple[int, str]]) -> "Lock":
        """A lock whose unknown sizes and digests come from `found`: name → (bytes, sha256). Known ones stay."""

        def fill(file: LockedFile) -> LockedFile:
            if file.name not in found:
                return file
            size, sha256 = found[file.name]
            return LockedFile(name=file.name, size=file.size or size, sha256=file.sha256 or sha256)

        return self.model_copy(update={"files": tuple(fill(file) for file in self.files)})

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"keys are given twice: {', '.join(twice)}")
    return dict(pairs)
