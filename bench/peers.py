"""Other engines on the same shape, for bench.cpu: runs under a Python that has them, and imports nothing of Starling.

    python peers.py llama-cpp model.gguf THREADS CONTEXTS PROMPTS
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


def llama_cpp(path: str, threads: int, contexts: list[int], prompts: list[int]) -> dict[str, Any]:
    from llama_cpp import Llama, __version__

    longest = max(contexts + prompts) + DECODED + 8
    model = Llama(path, n_ctx=longest, n_threads=threads, n_threads_batch=threads, verbose=False, use_mmap=False)
    decode, prefill = {}, {}
    for length in prompts:
        model.reset()
        prefill[length] = timed(lambda n=length: model.eval([300] * n))  # type: ignore[misc]
    for context in contexts:
        model.reset()
        model.eval([300] * context)
        decode[context] = statistics.median(timed(lambda: model.eval([301])) for _ in range(DECODED))
    return {"version": f"llama-cpp-python {__version__}", "decode_s": decode, "prefill_s": prefill}


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
    measure = {"llama-cpp": llama_cpp, "onnxruntime-genai": onnxruntime_genai}[engine]
    result = measure(path, int(threads), [int(n) for n in contexts.split(",")], [int(n) for n in prompts.split(",")])
    print(json.dumps({**result, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


if __name__ == "__main__":
    main()
