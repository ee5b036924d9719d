"""Other engines on the full-size model, one stream: time to a prompt's first token, and tokens per second."""

import sys
from pathlib import Path

from bench import full_size_gguf
from bench.gpu.serving import Callers
from bench.peer import Peer
from starling.errors import StarlingError
from starling.model.config import ModelConfig
from starling.settings import Settings

PROMPT_TOKENS = 128
ANSWER_TOKENS = 64
CONTEXTS, PROMPTS = (128, 1024), (128, 512)


def autoawq(folder: Path) -> str:
    """The reference engine: transformers and AutoAWQ, as the service runs it."""
    from starling.reference import ReferenceEngine

    engine = ReferenceEngine.from_folder(folder, Settings(device="cuda"))
    callers = Callers(engine, ModelConfig.from_folder(folder).vocab_size)
    first_s = callers.first_token_s(PROMPT_TOKENS, 2)
    _, seconds = callers.throughput(1, PROMPT_TOKENS, ANSWER_TOKENS)
    engine.close()
    rate = (ANSWER_TOKENS - 1) / (seconds - first_s)
    return f"decode {rate:.1f} tok/s, first token of {PROMPT_TOKENS} in {first_s * 1e3:.1f} ms"


def llama_cpp(folder: Path) -> str:
    """A GGUF of the same shape in Q4_0. Needs a llama-cpp-python that was built with CUDA."""
    from llama_cpp import llama_supports_gpu_offload

    if not llama_supports_gpu_offload():
        return "this llama-cpp-python was built without CUDA"
    gguf = full_size_gguf.make(folder.parent / f"{folder.name}.gguf")
    peer = Peer("llama-cpp-cuda", Path(sys.executable), gguf, 8, max(CONTEXTS))
    peer.ask("prefill", min(PROMPTS))  # loads the kernels
    decodes = ", ".join(f"{1 / peer.ask('decode', 1, context):.1f} at {context}" for context in CONTEXTS)
    prompts = ", ".join(f"{peer.ask('prefill', tokens) * 1e3:.1f} ms for {tokens}" for tokens in PROMPTS)
    peer.close()
    return f"{peer.version}: decode {decodes} tok/s, prompts {prompts}"


MODELS = {"autoawq": autoawq, "llama-cpp": llama_cpp}


def report(name: str, folder: Path) -> str:
    """One line: the figures, or why the engine cannot run here."""
    try:
        return f"- {name}: {MODELS[name](folder)}."
    except (ImportError, StarlingError) as error:
        return f"- {name}: not available here ({error})."
