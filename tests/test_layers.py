"""The architecture: imports point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Which parts of starling each room may import, besides itself and errors; from the top of the house to its ground.
FRONT = {"starling.garbage", "starling.generation", "starling.logs", "starling.request", "starling.service"}
ROOMS = {
    "predict.py": {*FRONT, "starling.coglet", "starling.settings"},
    "starling/replicas.py": {*FRONT, "starling.openapi", "starling.settings", "starling.weights"},
    "starling/client.py": set(),
    "starling/service.py": {
        "starling.chat", "starling.engine", "starling.generation", "starling.grammar", "starling.model",
        "starling.reference", "starling.request", "starling.settings", "starling.startup", "starling.tokenizer",
        "starling.weights",
    },
    "starling/startup.py": {"starling.__version__", "starling.settings", "starling.weights"},
    "starling/weights": {"starling.__version__", "starling.file_system", "starling.settings"},
    "starling/openapi.py": set(),
    "starling/garbage.py": set(),
    "starling/logs.py": set(),
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
DOWNLOADS = ROOT / "starling/weights/hub.py", "huggingface_hub"  # a module imported only to download


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}, line {node.lineno} imports relatively"
            top = node.module == "starling"  # then the names are its modules, or its version
            found |= {f"starling.{alias.name}" for alias in node.names} if top else {node.module}
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
            package = name.split(".")[0]
            if package == "starling":
                assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{path} imports {name}"
            assert package not in HEAVY or (path, package) == DOWNLOADS, f"{path} imports {name}"


def test_the_command_line_starts_without_torch() -> None:
    code = "import starling.__main__, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
