"""Other engines on the full-size model, one stream: first token of a prompt, and tokens per second."""

import json
import subprocess
import sys
from pathlib import Path

from bench import full_size_gguf
from bench.gpu.serving import Callers
from starling.errors import StarlingError
from starling.model.config import ModelConfig

PROMPT_TOKENS = 128
ANSWER_TOKENS = 64


def autoawq(folder: Path) -> str:
    """The reference engine: transformers and AutoAWQ, as the service runs it."""
    from starling.reference import ReferenceEngine

    engine = ReferenceEngine.from_folder(folder, "cuda", None, 120.0)
    callers = Callers(engine, ModelConfig.from_folder(folder).vocab_size)
    first_s = callers.first_token_s(PROMPT_TOKENS, 2)
    _, seconds = callers.throughput(1, PROMPT_TOKENS, ANSWER_TOKENS)
    engine.close()
    rate = (ANSWER_TOKENS - 1) / (seconds - first_s)
    return f"decode {rate:.1f} tok/s, first token of {PROMPT_TOKENS} in {first_s * 1e3:.1f} ms"


def llama_cpp(folder: Path) -> str:
    """A GGUF of the same shape in Q4_0, on a llama-cpp-python that was built with CUDA."""
    from llama_cpp import llama_supports_gpu_offload

    if not llama_supports_gpu_offload():
        return "this llama-cpp-python was built without CUDA"
    gguf = full_size_gguf.make(folder.parent / f"{folder.name}.gguf")
    script = Path(__file__).parents[1] / "peers.py"
    command = [sys.executable, str(script), "llama-cpp-cuda", str(gguf), "8", "128,1024", "128,512"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    decodes = ", ".join(f"{1 / s:.1f} at {context}" for context, s in found["decode_s"].items())
    prompts = ", ".join(f"{s * 1e3:.1f} ms for {tokens}" for tokens, s in found["prefill_s"].items())
    return f"{found['version']}: decode {decodes} tok/s, prompts {prompts}"


MODELS = {"autoawq": autoawq, "llama-cpp": llama_cpp}


def report(name: str, folder: Path) -> str:
    """One line; where an engine is not there, that."""
    try:
        return f"- {name}: {MODELS[name](folder)}."
    except (ImportError, StarlingError) as error:
        return f"- {name}: not to be had here ({error})."
