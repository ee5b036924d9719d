"""The house: imports point down only, and the pins agree."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
# Which parts of starling each room may import, beside itself and errors.
ROOMS = {
    "starling/model/ops": {"starling.model.awq", "starling.model.batch", "starling.model.control_groups"},
    "starling/model": set(),
    "starling/engine": {"starling.model"},
    "starling/request.py": set(),
    "starling/settings.py": set(),
    "starling/stops.py": set(),
    "starling/tokenizer.py": set(),
    "starling/chat.py": {"starling.request"},
    "starling/grammar.py": {"starling.request", "starling.tokenizer"},
    "starling/generation.py": {
        "starling.chat", "starling.engine", "starling.request", "starling.stops", "starling.tokenizer",
    },
    "starling/coglet.py": set(),
    "starling/errors.py": set(),
}  # fmt: skip
# What no room of the serving path imports at its top: slow, or not installed there.
HEAVY = {"transformers", "awq", "accelerate", "datasets", "sentencepiece", "gguf", "mistral_common", "huggingface_hub"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def sources(room: str) -> list[Path]:
    path = ROOT / room
    return [path] if path.suffix else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_only(room: str) -> None:
    own = room.removesuffix(".py").replace("/", ".")
    allowed = {own, "starling.errors", *ROOMS[room]}
    for path in sources(room):
        for name in imports(path):
            if name.split(".")[0] == "starling":
                assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{path} imports {name}"
            assert name.split(".")[0] not in HEAVY, f"{path} imports {name}"


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(re.split("==", line, maxsplit=1) for line in lines if "==" in line)  # type: ignore[misc]


def test_the_image_and_the_cpu_install_agree() -> None:
    image, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    del image["torch"], cpu["torch"]
    assert image.items() <= cpu.items()


def test_pyproject_names_what_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(project["dependencies"]) == set(pins("requirements.txt"))
    assert {*project["dependencies"], *extras["cli"]} == set(pins("requirements-cpu.txt"))
    assert set(extras["demo"]) == set(pins("requirements-demo.txt"))
    assert set(extras["replicas"]) == set(pins("requirements-replicas.txt"))
    assert set(extras["dev"]) == set(pins("requirements-dev.txt"))


def test_every_requirement_is_pinned() -> None:
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            pinned = re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.+]+", line)
            assert not line or line.startswith("#") or pinned, f"{path.name}: {line}"


def test_the_oldest_python_that_is_promised_can_install_every_pin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=").partition(",")[0]
    for path in ROOT.glob("requirements*.txt"):
        for name in pins(path.name):
            try:
                wanted = metadata(name.partition("[")[0])["Requires-Python"] or ""
            except PackageNotFoundError:
                continue  # of the reference or the replicas
            assert SpecifierSet(wanted).contains(f"{oldest}.0"), f"{name} needs Python {wanted}"


def test_the_reference_is_pinned_as_the_tests_have_it() -> None:
    reference, dev = pins("requirements-reference.txt"), pins("requirements-dev.txt")
    assert {name: reference[name] for name in ("accelerate", "transformers")}.items() <= dev.items()


def test_the_command_line_starts_without_torch() -> None:
    code = "import starling.__main__, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
