"""What `cog build` does with a cog.yaml, as a Dockerfile for builders other than Cog.

    python scripts/cog_build.py cog-cpu.yaml --base my-python > Dockerfile

It follows the order of Cog 0.23: base, environment, system packages, requirements, cog itself, build.run, working
directory, port, predictor, source, schema. It differs where Cog needs network access that a test lacks: cog is
installed by pip instead of uv, and tini is expected in the base. tests/test_image.py checks the rendered text;
scripts/image builds it.
"""

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from starling.openapi import declared_concurrency  # noqa: E402

REQUIREMENTS = ".cog/tmp/requirements.txt"  # written by the builder: see `requirements`
SCHEMA = ".cog/openapi_schema.json"
UV = "uv pip install --break-system-packages --no-cache"  # as Cog calls it
TORCH_INDEX = "https://download.pytorch.org/whl"
MANAGED = ("cog", "coglet")  # dropped from the requirements: Cog installs cog, which brings coglet

TOP_KEYS = {"build", "image", "model", "run", "predict", "train", "concurrency", "observability", "environment"}
BUILD_KEYS = {
    "gpu", "cuda", "cudnn", "python_version", "python_requirements", "system_packages", "run", "sdk_version",
}  # fmt: skip
SAMPLERS = {
    "always_on", "always_off", "traceidratio",
    "parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio",
}  # fmt: skip
# What `environment` may not set (Cog's pkg/config/env.go).
RESERVED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|LIBRARY_PATH|PYTHONPATH|PYTHONUNBUFFERED|VIRTUAL_ENV|HF_ENDPOINT|HF_HUB_ENABLE_HF_TRANSFER"
    r"|(CUDA|NVIDIA|NV|REPLICATE|R8|PGET|KUBERNETES)_.*)$"
)


class CogYamlError(Exception):
    """Cog would refuse the file."""


@dataclass(frozen=True)
class CogYaml:
    """A validated cog.yaml."""

    name: str  # of the file
    build: dict[str, Any]
    predict: str
    environment: list[str] = field(default_factory=list)
    traces: dict[str, Any] = field(default_factory=dict)  # of `observability`

    @classmethod
    def read(cls, path: Path) -> "CogYaml":
        """Raises CogYamlError naming the key."""
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        build = raw.get("build", {})
        for found, allowed in ((raw, TOP_KEYS), (build, BUILD_KEYS)):
            if unknown := set(found) - allowed:
                raise CogYamlError(f"{path.name}: Cog has no key {', '.join(sorted(unknown))}")
        if not re.fullmatch(r"3\.1[1-3]", str(build.get("python_version"))):
            raise CogYamlError(
                f"{path.name}: python_version is {build.get('python_version')!r}; write '3.11' to '3.13'"
            )
        for entry in raw.get("environment", []):
            name, equals, value = entry.partition("=")
            if not equals or " " in value or RESERVED.match(name):
                raise CogYamlError(f"{path.name}: environment cannot hold {entry!r}")
        traces = raw.get("observability", {}).get("traces", {})
        if (sampler := traces.get("sampler", "always_off")) not in SAMPLERS:
            raise CogYamlError(f"{path.name}: there is no sampler {sampler!r}")
        return cls(path.name, build, raw["predict"], raw.get("environment", []), traces)

    @property
    def base_image(self) -> str:
        """What Cog builds on where it has no prebuilt base of its own."""
        if self.build.get("gpu"):
            return f"nvidia/cuda:{self.build['cuda']}-cudnn-devel-ubuntu22.04"
        return f"python:{self.build['python_version']}-slim"


def requirements(config: CogYaml, root: Path = ROOT) -> str:
    """The requirements that Cog installs: the project's, without the packages that Cog manages itself.

    For a GPU, Cog names PyTorch's index for the image's CUDA first, if it knows the version of torch
    (pkg/config/torch_compatibility.json). pip prefers the build there, 2.11.0+cu128, to PyPI's, which is for CUDA 13.0.
    """
    lines = (root / config.build["python_requirements"]).read_text(encoding="utf-8").splitlines(keepends=True)
    if config.build.get("gpu"):
        lines.insert(0, f"--extra-index-url {TORCH_INDEX}/cu{config.build['cuda'].replace('.', '')}/\n")
    return "".join(line for line in lines if re.split(r"[=<>\[ ]", line.strip())[0] not in MANAGED)


def dockerfile(config: CogYaml, root: Path = ROOT, base: str | None = None, pip_options: str = "") -> str:
    """The Dockerfile, one step per line. `pip_options` are added to every pip install."""
    build, traces = config.build, config.traces
    lines = [f"FROM {base or config.base_image}", "ENV PYTHONUNBUFFERED=1", 'ENTRYPOINT ["tini", "--"]']
    lines += [f"ENV {entry}" for entry in config.environment]
    if packages := build.get("system_packages"):
        names = " ".join(packages)
        lines.append(f"RUN apt-get update -qq && apt-get install -qqy {names} && rm -rf /var/lib/apt/lists/*")
    pip = " ".join(["pip install --no-cache-dir", *pip_options.split()])
    lines += [f"COPY {REQUIREMENTS} /tmp/requirements.txt", f"RUN {pip} -r /tmp/requirements.txt"]
    extra = "[tracing]" if traces.get("enabled") else ""
    lines.append(f"RUN {pip} cog{extra}=={build['sdk_version']}")
    lines += [f"RUN {command.replace(UV, pip)}" for command in build.get("run", [])]
    lines += ["WORKDIR /src", "EXPOSE 5000", f'ENV COG_PREDICT_TYPE_STUB="{config.predict}"']
    lines.append(f"ENV COG_MAX_CONCURRENCY={declared_concurrency(root / config.predict.split(':')[0])}")
    if traces.get("enabled"):
        lines.append("ENV COG_TRACE_CONFIGURED=true")
        lines += [f"ENV COG_TRACE_SAMPLER={traces['sampler']}"] if "sampler" in traces else []
    lines += ['CMD ["python", "-m", "cog.server.http"]', "COPY . /src"]
    lines += [f"RUN cp /src/{config.name} /src/cog.yaml"] if config.name != "cog.yaml" else []
    lines.append(f"COPY {SCHEMA} /src/.cog/")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--base", help="the base image, instead of Cog's")
    parser.add_argument("--pip-options", default="", help="added to every pip install")
    parser.add_argument("--requirements", action="store_true", help="print the requirements instead")
    options = parser.parse_args()
    try:
        config = CogYaml.read(options.file)
    except (CogYamlError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    if options.requirements:
        print(requirements(config), end="")
    else:
        print(dockerfile(config, base=options.base, pip_options=options.pip_options), end="")


if __name__ == "__main__":
    main()
