"""The architecture: imports point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Which parts of starling each room may import, besides itself and errors.
ROOMS = {
    "starling/model/ops": {
        "starling.file_system", "starling.model.awq", "starling.model.batch", "starling.model.control_groups",
    },
    "starling/model": {"starling.file_system", "starling.json_file"},
    "starling/engine": {"starling.model"},
    "starling/request.py": set(),
    "starling/settings.py": set(),
    "starling/stops.py": set(),
    "starling/tokenizer.py": {"starling.json_file"},
    "starling/chat.py": {"starling.request"},
    "starling/grammar.py": {"starling.json_schema", "starling.request", "starling.tokenizer"},
    "starling/json_schema.py": {"starling.request"},
    "starling/generation.py": {
        "starling.chat", "starling.engine", "starling.request", "starling.stops", "starling.tokenizer",
    },
    "starling/coglet.py": set(),
    "starling/file_system.py": set(),
    "starling/json_file.py": set(),
    "starling/errors.py": set(),
}  # fmt: skip
# What no room of the serving path imports: slow to load, or not installed for serving.
HEAVY = {"transformers", "awq", "accelerate", "datasets", "sentencepiece", "gguf", "mistral_common", "huggingface_hub"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}, line {node.lineno} imports relatively"
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


def test_the_command_line_starts_without_torch() -> None:
    code = "import starling.__main__, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
