"""What serving imports: nothing that is slow to load or missing from the image."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
KEPT_OUT = {"transformers", "awq", "accelerate", "datasets", "huggingface_hub", "sentencepiece", "gguf", "httpx", "ray"}
SERVE = """
import json, os, sys
import predict
from starling.request import Request
from starling.settings import Settings

service = predict.Predictor().load_service(Settings.from_env(os.environ))
result = service.answer(Request.parse(prompt="a", max_tokens=3, json_schema='{"type": "string"}'))
service.close()
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_serving_imports_only_what_it_needs(tiny_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        env={"STARLING_WEIGHTS": str(tiny_folder), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"torch", "predict", "starling"} <= imported
    assert not imported & KEPT_OUT
