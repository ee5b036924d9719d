"""Other engines on a model of the same shape, for bench.cpu and bench.gpu.

    python peers.py llama-cpp model.gguf THREADS LONGEST
    python peers.py llama-cpp-cuda model.gguf THREADS LONGEST
    python peers.py onnxruntime-genai ONNX_FOLDER THREADS LONGEST

Runs under a Python that has them installed, and imports nothing of ours. LONGEST is the most tokens of context that
will be asked for. Once the engine is loaded, prints its version as one line of JSON, then answers each line of input
with one: `decode BATCH CONTEXT` and `prefill TOKENS` with seconds, `memory` with the resident bytes now and at the
peak. So engines can take turns while all of them stay loaded. At BATCH 1 a longer context extends the same sequence.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

STEPS = 6  # decode steps, of which the fastest counts: any other process delays an engine whose threads spin


class Peer(Protocol):
    version: str

    def decode(self, batch: int, context: int) -> float:
        """Seconds of the fastest of a few steps that add a token to each of `batch` sequences of `context` tokens."""
        ...

    def prefill(self, tokens: int) -> float: ...


def timed(work: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


class LlamaCpp:
    gpu_layers = 0

    def __init__(self, path: str, threads: int, longest: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._threads, self._path = threads, path
        self._llama = llama_cpp.Llama(
            path, n_ctx=longest + STEPS + 8, n_batch=512, n_threads=threads, n_threads_batch=threads,
            n_gpu_layers=self.gpu_layers, verbose=False, use_mmap=False,
        )  # fmt: skip

    def decode(self, batch: int, context: int) -> float:
        llama = self._llama
        if batch > 1:
            return self._decode_many(batch, context)
        if llama.n_tokens > context:
            llama.reset()
        llama.eval([300] * (context - llama.n_tokens))
        return min(timed(lambda: llama.eval([301])) for _ in range(STEPS))

    def _decode_many(self, batch: int, context: int) -> float:
        """By llama_decode over several sequences at once, which llama_cpp.Llama cannot do."""
        api, model = self._api, self._llama.model
        params = api.llama_context_default_params()
        params.n_ctx = batch * (context + STEPS + 8)
        params.n_seq_max, params.n_threads, params.n_threads_batch = batch, self._threads, self._threads
        handle = api.llama_init_from_model(model, params)
        tokens = api.llama_batch_init(max(batch, context), 0, batch)
        try:
            self._fill(tokens, [(position, 0) for position in range(context)])
            self._check(api.llama_decode(handle, tokens))
            for sequence in range(1, batch):
                api.llama_memory_seq_cp(api.llama_get_memory(handle), 0, sequence, -1, -1)

            def step(position: int) -> None:
                self._fill(tokens, [(position, sequence) for sequence in range(batch)])
                self._check(api.llama_decode(handle, tokens))
                api.llama_synchronize(handle)

            return min(timed(lambda n=n: step(context + n)) for n in range(STEPS))  # type: ignore[misc]
        finally:
            api.llama_batch_free(tokens)
            api.llama_free(handle)

    @staticmethod
    def _fill(tokens: Any, places: list[tuple[int, int]]) -> None:
        tokens.n_tokens = len(places)
        for i, (position, sequence) in enumerate(places):
            tokens.token[i], tokens.pos[i] = 300, position
            tokens.n_seq_id[i], tokens.seq_id[i][0] = 1, sequence
            tokens.logits[i] = 1 if len(places) < 64 or i == len(places) - 1 else 0

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def prefill(self, tokens: int) -> float:
        self._llama.reset()
        return timed(lambda: self._llama.eval([300] * tokens))


class LlamaCppCuda(LlamaCpp):
    """With every layer on the GPU. Needs a llama-cpp-python that was built with CUDA."""

    gpu_layers = -1


class OnnxRuntimeGenai:
    def __init__(self, folder: str, threads: int, longest: int) -> None:
        import onnxruntime_genai as og

        self._api = og
        self.version = f"onnxruntime-genai {og.__version__}"
        config = og.Config(folder)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = og.Model(config)
        self._longest = longest
        self._single: Any = None

    def _generator(self, batch: int, tokens: int) -> Any:
        params = self._api.GeneratorParams(self._model)
        params.set_search_options(max_length=tokens + STEPS + 8, do_sample=False, batch_size=batch)
        return self._api.Generator(self._model, params)

    def decode(self, batch: int, context: int) -> float:
        import numpy as np

        if batch == 1:
            if self._single is None or self._single.token_count() > context:
                self._single = self._generator(1, self._longest)
            generator = self._single
            generator.append_tokens([300] * (context - generator.token_count()))
        else:
            generator = self._generator(batch, context)
            generator.append_tokens(np.full((batch, context), 300, dtype=np.int32))
        generator.generate_next_token()
        return min(timed(generator.generate_next_token) for _ in range(STEPS))

    def prefill(self, tokens: int) -> float:
        generator = self._generator(1, tokens)
        return timed(lambda: generator.append_tokens([300] * tokens))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    engine, path, threads, longest = sys.argv[1:]
    kinds: dict[str, Callable[[str, int, int], Peer]] = {
        "llama-cpp": LlamaCpp,
        "llama-cpp-cuda": LlamaCppCuda,
        "onnxruntime-genai": OnnxRuntimeGenai,
    }
    peer = kinds[engine](path, int(threads), int(longest))
    print(json.dumps(peer.version), flush=True)
    for line in sys.stdin:
        what, *counts = line.split()
        answer: Any
        if what == "decode":
            answer = peer.decode(*(int(count) for count in counts))
        elif what == "prefill":
            answer = peer.prefill(*(int(count) for count in counts))
        else:
            answer = [resident_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
