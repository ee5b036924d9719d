"""The image: rendered from cog.yaml as `cog build` would, and checked against what the server needs."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.cog_build import MANAGED, REQUIREMENTS, SCHEMA, UV, CogYaml, CogYamlError, dockerfile, requirements
from tests.test_requirements import BROUGHT

ROOT = Path(__file__).parent.parent
FILES = ["cog.yaml", "cog-cpu.yaml"]
MADE_BY_COG = {REQUIREMENTS, SCHEMA}
SMALL_BYTES = 200_000  # for a single file of ours


def ignore_patterns() -> list[tuple[re.Pattern[str], bool]]:
    """.dockerignore's lines, in order: a pattern, and whether what it matches is left out."""
    lines = (line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines())
    found = []
    for line in lines:
        if line and not line.startswith("#"):
            text = re.escape(line.removeprefix("!"))
            text = text.replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*").replace(r"\[", "[").replace(r"\]", "]")
            found.append((re.compile(text), not line.startswith("!")))
    return found


PATTERNS = ignore_patterns()


def ignored(path: str) -> bool:
    """Docker's rule: the last line that matches the path or a folder above it decides."""
    parts = path.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    out = False
    for pattern, leaves_out in PATTERNS:
        if any(pattern.fullmatch(name) for name in above):
            out = leaves_out
    return out


def context() -> list[str]:
    """The files of this checkout that would be sent to the builder."""
    skipped = {".git", ".venv", ".venv-cuda", "node_modules"}
    found = []
    for top in ROOT.iterdir():
        if top.name not in skipped:
            found += [top] if top.is_file() else [path for path in top.rglob("*") if path.is_file()]
    names = (path.relative_to(ROOT).as_posix() for path in found)
    return sorted(name for name in names if not ignored(name))


def lines_of(name: str) -> list[str]:
    return dockerfile(CogYaml.read(ROOT / name)).splitlines()


def position(lines: list[str], beginning: str) -> int:
    return next(n for n, line in enumerate(lines) if line.startswith(beginning))


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_is_copied_is_there(name: str) -> None:
    for line in lines_of(name):
        if line.startswith("COPY ") and not line.startswith("COPY . "):
            source = line.split()[1]
            assert source in MADE_BY_COG or (ROOT / source).exists()
            assert not ignored(source)
        if line.startswith("RUN cp "):
            assert line.split()[2].removeprefix("/src/") in context()


@pytest.mark.parametrize("name", FILES)
def test_the_steps_stand_in_cog_s_order(name: str) -> None:
    lines = lines_of(name)
    order = [
        "FROM ",
        *(["RUN apt-get "] if name == "cog-cpu.yaml" else []),
        "COPY .cog/tmp/req",
        "RUN pip install",
        "WORKDIR /src",
        "EXPOSE 5000",
    ]
    order += ["ENV COG_PREDICT_TYPE_STUB", "CMD ", "COPY . /src"]
    order += ["RUN cp /src/cog-cpu.yaml /src/cog.yaml"] if name == "cog-cpu.yaml" else []
    order += ["COPY .cog/openapi"]
    found = [position(lines, beginning) for beginning in order]
    assert found == sorted(found)
    assert lines[position(lines, "CMD ")] == 'CMD ["python", "-m", "cog.server.http"]'
    assert "ENV COG_MAX_CONCURRENCY=32" in lines


def test_both_images_have_the_same_cog_and_each_what_its_kernels_need() -> None:
    gpu, cpu = (CogYaml.read(ROOT / name) for name in FILES)
    assert gpu.build["sdk_version"] == cpu.build["sdk_version"] == "0.23.1"
    for config in (gpu, cpu):
        pinned = re.findall(r"^cog(?:let)?==(.*)$", (ROOT / config.build["python_requirements"]).read_text(), re.M)
        assert set(pinned) == {config.build["sdk_version"]}
        assert not re.search(r"^cog", requirements(config), re.M)
        assert config.build["run"] == [f"{UV} coglet=={config.build['sdk_version']}"]
    assert cpu.build["system_packages"] == ["g++"] and "STARLING_DEVICE=cuda" in gpu.environment
    assert gpu.base_image.startswith("nvidia/cuda:12.8-") and cpu.base_image == "python:3.11-slim"
    # The image's CUDA, not that of PyPI's build, which needs a newer driver. Cog knows the builds of these versions.
    index = "--extra-index-url https://download.pytorch.org/whl/cu128/"
    assert requirements(gpu).splitlines()[0] == index and "torch==2.11.0\n" in requirements(gpu)
    assert "--extra-index-url" not in requirements(cpu)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("build: {python_version: '3.11', pyhton: 1}\npredict: p", "pyhton"),
        ("biuld: {}\npredict: p", "biuld"),
        ("build: {python_version: '3.9'}\npredict: p", "3.9"),
        ("build: {python_version: '3.11'}\nenvironment: [PATH=/x]\npredict: p", "PATH"),
        ("build: {python_version: '3.11'}\nenvironment: [NV_X=1]\npredict: p", "NV_X"),
        ("build: {python_version: '3.11'}\nenvironment: ['A=b c']\npredict: p", "b c"),
        ("build: {python_version: '3.11'}\nobservability: {traces: {sampler: some}}\npredict: p", "some"),
    ],
)
def test_what_cog_would_refuse_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "cog.yaml").write_text(text)
    with pytest.raises(CogYamlError, match=fault):
        CogYaml.read(tmp_path / "cog.yaml")


def test_a_faulty_file_is_reported_in_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.cog_build", str(tmp_path / "cog.yaml")]
    missing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (tmp_path / "cog.yaml").write_text("build: {python_version: '3.9'}\npredict: p")
    faulty = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert missing.returncode == faulty.returncode == 1
    assert re.fullmatch("error: .*No such file.*\n", missing.stderr)
    assert faulty.stderr == "error: cog.yaml: python_version is '3.9'; write '3.11' to '3.13'\n"


# -- what the server imports ---------------------------------------------------------------------------------------


def imported(path: Path) -> Iterator[str]:
    """Every module that the file may import when it runs, inside functions too."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# Imported on request alone; the image does not install what they need (requirements-reference.txt).
SECOND_ENGINE = ("starling.reference", "starling.quantize.layerwise", "starling.evaluate.text")


def file_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def reachable(*start: str) -> tuple[set[Path], set[str]]:
    """Our files that the modules import, directly or indirectly, and the third-party packages those import."""
    ours: set[Path] = set()
    foreign: set[str] = set()
    waiting = list(start)
    while waiting:
        module = waiting.pop()
        path = file_of(module)
        if module.startswith(SECOND_ENGINE):
            continue
        if path is None:
            if module.split(".")[0] not in ("starling", "predict"):
                foreign.add(module.split(".")[0])
        elif path not in ours:
            ours.add(path)
            waiting += imported(path)
            waiting += [module.rpartition(".")[0]] if "." in module else []
    return ours, {name for name in foreign if name not in sys.stdlib_module_names and name}


def normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def named(config: CogYaml) -> set[str]:
    """What the image installs by name, without the dependencies of that."""
    asked, _, _ = requirements(config).partition(BROUGHT)
    return {normal(line.split("==")[0]) for line in asked.splitlines() if "==" in line} | set(MANAGED)


@pytest.mark.parametrize("name", FILES)
def test_what_the_server_imports_is_in_the_image_and_pinned(name: str) -> None:
    ours, foreign = reachable("predict", "starling.__main__")
    sent = set(context())
    for path in ours:
        assert path.relative_to(ROOT).as_posix() in sent
    installed = named(CogYaml.read(ROOT / name))
    distributions = importlib.metadata.packages_distributions()
    for package in foreign:
        assert installed & {normal(found) for found in distributions[package]}, f"{package} is not installed"


def test_the_image_installs_only_what_the_server_imports() -> None:
    _, foreign = reachable("predict", "starling.__main__")
    distributions = importlib.metadata.packages_distributions()
    needed = {normal(found) for package in foreign for found in distributions[package]}
    assert named(CogYaml.read(ROOT / "cog.yaml")) <= needed | set(MANAGED)


# -- what could slip in --------------------------------------------------------------------------------------------


def test_the_kernels_sources_and_the_lock_are_sent() -> None:
    sent = set(context())
    native = [path.relative_to(ROOT).as_posix() for path in (ROOT / "starling/model/ops/cpu/native").iterdir()]
    assert native and sent >= {*native, "predict.py", "weights/starling-lm-7b-alpha-awq.lock"}
    assert not ignored("weights/starling-lm-7b-alpha-awq/model.safetensors")
    assert not ignored("weights/starling-lm-7b-alpha-awq/.verified.json")
    assert not ignored(SCHEMA) and not ignored(REQUIREMENTS)  # scripts/image hands them over


def test_nothing_large_or_secret_slips_in() -> None:
    for name in context():
        if not name.startswith(("weights/starling-lm-7b-alpha-awq/", ".cog/")):
            assert (ROOT / name).stat().st_size < SMALL_BYTES, name
    for name in (
        ".git/config",
        ".venv/bin/python",
        ".mypy_cache/3.11/a.json",
        ".hypothesis/examples/a",
        "bench/results/a.md",
        "tests/test_image.py",
        "scripts/image",
        "weights/demo/model.safetensors",
        "weights/demo-full/model.safetensors",
        "weights/mine/model.safetensors",
        "weights/model.safetensors",
        "starling/demo_scales.safetensors",
        "weights/.demo.lock",
        "weights/starling-lm-7b-alpha-awq/.partial/model.safetensors.f0a8",
        "weights/starling-lm-7b-alpha-awq/packed-cpu-7.bin",
        "starling/__pycache__/a.cpython-311.pyc",
        "starling/a.pyc",
        ".env",
        "starling/.env",
        "weights/id.pem",
        "core.1234",
        "notes.txt",
        ".netrc",
    ):
        assert ignored(name), name
