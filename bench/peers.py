"""Other engines on the same shape, for bench.cpu and bench.gpu. Runs under a Python that has them; nothing of ours.

    python peers.py llama-cpp model.gguf THREADS CONTEXTS PROMPTS
    python peers.py llama-cpp-cuda model.gguf THREADS CONTEXTS PROMPTS
    python peers.py onnxruntime-genai ONNX_FOLDER THREADS CONTEXTS PROMPTS

CONTEXTS and PROMPTS are comma-separated token counts. Prints one JSON object: seconds per token at each context, and
per prompt of each length, and the peak of resident memory in bytes.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

DECODED = 8  # tokens timed at each context


def timed(work: Callable[[], Any]) -> float:
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


def llama_cpp(path: str, threads: int, contexts: list[int], prompts: list[int], gpu_layers: int = 0) -> dict[str, Any]:
    from llama_cpp import Llama, __version__

    longest = max(contexts + prompts) + DECODED + 8
    model = Llama(
        path, n_ctx=longest, n_batch=512, n_threads=threads, n_threads_batch=threads, n_gpu_layers=gpu_layers,
        verbose=False, use_mmap=False,
    )  # fmt: skip
    decode, prefill = {}, {}
    if gpu_layers:
        model.eval([300] * min(prompts))  # loads its kernels
    for length in prompts:
        model.reset()
        prefill[length] = timed(lambda n=length: model.eval([300] * n))  # type: ignore[misc]
    for context in contexts:
        model.reset()
        model.eval([300] * context)
        decode[context] = statistics.median(timed(lambda: model.eval([301])) for _ in range(DECODED))
    return {"version": f"llama-cpp-python {__version__}", "decode_s": decode, "prefill_s": prefill}


def llama_cpp_cuda(path: str, threads: int, contexts: list[int], prompts: list[int]) -> dict[str, Any]:
    """Every layer on the GPU, where llama-cpp-python was built with CUDA."""
    return llama_cpp(path, threads, contexts, prompts, gpu_layers=-1)


def onnxruntime_genai(folder: str, threads: int, contexts: list[int], prompts: list[int]) -> dict[str, Any]:
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def generator(length: int) -> Any:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length + DECODED + 8, do_sample=False)
        return og.Generator(model, params)

    decode, prefill = {}, {}
    for length in prompts:
        fresh = generator(length)
        prefill[length] = timed(lambda g=fresh, n=length: g.append_tokens([300] * n))  # type: ignore[misc]
    for context in contexts:
        fresh = generator(context)
        fresh.append_tokens([300] * context)
        fresh.generate_next_token()
        decode[context] = statistics.median(timed(lambda g=fresh: g.append_tokens([301])) for _ in range(DECODED))  # type: ignore[misc]
    return {"version": f"onnxruntime-genai {og.__version__}", "decode_s": decode, "prefill_s": prefill}


def main() -> None:
    engine, path, threads, contexts, prompts = sys.argv[1:]
    engines = {"llama-cpp": llama_cpp, "llama-cpp-cuda": llama_cpp_cuda, "onnxruntime-genai": onnxruntime_genai}
    measure = engines[engine]
    result = measure(path, int(threads), [int(n) for n in contexts.split(",")], [int(n) for n in prompts.split(",")])
    print(json.dumps({**result, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
