"""The CPU kernels: independence from the batch, bit for bit; whole models; compiling and choosing."""

import logging
import multiprocessing
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from starling.errors import DeviceError
from starling.model import control_groups
from starling.model.awq import quantize
from starling.model.kv_cache import KVCache
from starling.model.mistral import Mistral
from starling.model.ops.cpu import CpuOps, TorchCpuOps, cores, cpu_ops, library
from starling.model.ops.cpu import compiler as compiler_module
from starling.model.ops.cpu.compiler import FLAGS, NATIVE, NoCompilerError, compile_ahead, find_compiler, library_paths
from starling.model.ops.cpu.library import usable_instruction_sets
from starling.model.ops.cpu.ops import PRECISIONS
from starling.model.ops.reference import ReferenceOps
from tests.model.instruction_sets import instruction_sets, ops_of
from tests.model.paged import Piece, random_table, step
from tests.model.test_ops import error, random_awq
from tests.model.tiny import transformers_model, write_checkpoint

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return folder


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_the_others(precision: str, isa: str, rng: random.Random) -> None:
    inputs, outputs, group = rng.choice([(1024, 136, 128), (576, 64, 64), (160, 40, 32)])
    ops, alone = ops_of(isa, rng.choice([2, 16]), precision), ops_of(isa, 1, precision)
    weight = ops.pack_awq(random_awq(inputs, outputs, group))
    head = ops.pack_head(torch.randn(outputs, inputs).half())
    tokens = rng.choice([2, 5, 23, 64, 530])
    x, prompt = torch.randn(tokens, inputs), torch.rand(tokens) < 0.5
    together, logits = ops.awq_linear(x, weight, prompt), ops.head(x, head)
    for row in rng.sample(range(tokens), min(tokens, 20)):
        one = slice(row, row + 1)
        assert torch.equal(together[one], alone.awq_linear(x[one], weight, prompt[one]))
        assert torch.equal(logits[one], alone.head(x[one], head))


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("precision", ["int16", "int8"])
def test_rows_are_cut_into_tiles_of_any_height(precision: str, isa: str) -> None:
    many, one = ops_of(isa, 2, precision), ops_of(isa, 1, precision)
    weight, x = many.pack_awq(random_awq(256, 40, 64)), torch.randn(33, 256)
    alone = torch.cat([one.awq_linear(row, weight, torch.ones(1, dtype=torch.bool)) for row in x.split(1)])
    for tokens in range(1, 34):
        assert torch.equal(many.awq_linear(x[:tokens], weight, torch.ones(tokens, dtype=torch.bool)), alone[:tokens])


@pytest.mark.parametrize("isa", usable_instruction_sets())
@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 300])
def test_attention_is_the_same_in_prefill_chunks_and_decode(
    isa: str, kv_dtype: torch.dtype, window: int | None, rng: random.Random
) -> None:
    heads, kv_heads, dim = rng.choice([(8, 2, 64), (9, 3, 32), (4, 4, 24)])
    many, one = CpuOps(3, kv_dtype=kv_dtype, isa=isa), CpuOps(1, kv_dtype=kv_dtype, isa=isa)
    length, blocks = rng.randint(500, 700), 64
    rotary = torch.randn(1024, dim)
    qkv = torch.randn(length, (heads + 2 * kv_heads) * dim)
    table = random_table(rng, length, BLOCK_SIZE, list(range(blocks)))

    def run(ops: CpuOps, cuts: list[int]) -> torch.Tensor:
        keys, values = torch.full((2, blocks, kv_heads, BLOCK_SIZE, dim), torch.nan).to(kv_dtype)
        outs = []
        for start, end in zip([0, *cuts], [*cuts, length], strict=True):
            batch = step([Piece(table, start, end - start)], BLOCK_SIZE)
            q = ops.rotate_and_cache(qkv[start:end], batch, rotary, keys, values)
            outs.append(ops.attention(q, keys, values, batch, window))
        return torch.cat(outs)

    whole = run(one, [])
    assert torch.equal(whole, run(many, sorted(rng.sample(range(1, length), 3))))
    assert torch.equal(whole, run(many, list(range(length - 40, length))))  # a prompt, then token by token


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_answers_the_same_alone_in_chunks_and_in_a_batch(
    precision: str, checkpoint: Path, rng: random.Random
) -> None:
    """Three requests, 330 tokens or more each: whole and alone, against mixed steps of odd chunks on more threads."""
    lengths = [rng.randint(330, 400) for _ in range(3)]
    prompts = [rng.randint(1, length) for length in lengths]  # tokens after these count as generated
    ids = [torch.randint(0, 331, (length,)) for length in lengths]

    def pieces_of(request: int, table: list[int], start: int, end: int) -> list[Piece]:
        # A step's tokens of one request are all of its prompt or all generated.
        middle = min(max(prompts[request], start), end)
        return [
            Piece(table, a, b - a, prompt) for a, b, prompt in [(start, middle, True), (middle, end, False)] if b > a
        ]

    alone = Mistral.load(checkpoint, CpuOps(1, precision))  # type: ignore[arg-type]
    wanted = []
    for request, length in enumerate(lengths):
        cache = alone.allocate_cache(64, BLOCK_SIZE)
        table = list(range(30))
        logits = [
            alone.forward(step([piece], BLOCK_SIZE, ids[request][piece.start : piece.start + piece.count]), cache)
            for piece in pieces_of(request, table, 0, length)
        ]
        wanted.append(torch.cat(logits))

    batched = Mistral.load(checkpoint, CpuOps(3, precision))  # type: ignore[arg-type]
    cache = batched.allocate_cache(128, BLOCK_SIZE)
    free = list(range(128))
    tables = [random_table(rng, length, BLOCK_SIZE, free) for length in lengths]
    found: list[list[torch.Tensor]] = [[], [], []]
    done = [0, 0, 0]
    while any(done[r] < lengths[r] for r in range(3)):
        chosen = []
        for r in rng.sample(range(3), 3):
            if done[r] < lengths[r] and rng.random() < 0.8:
                piece = pieces_of(r, tables[r], done[r], min(lengths[r], done[r] + rng.choice([1, 2, 7, 60])))[0]
                chosen.append((r, piece))
                done[r] += piece.count
        if chosen:
            tokens = torch.cat([ids[r][p.start : p.start + p.count] for r, p in chosen])
            logits = batched.forward(step([p for _, p in chosen], BLOCK_SIZE, tokens), cache)
            for (r, _), part in zip(chosen, logits.split([p.count for _, p in chosen]), strict=True):
                found[r].append(part)
    for r in range(3):
        assert torch.equal(wanted[r], torch.cat(found[r]))


@pytest.mark.parametrize(("precision", "kv_dtype", "allowed"), [
    ("float32", torch.float32, 1e-4),
    ("int16", torch.float32, 2e-3),
    ("auto", torch.float16, 0.5),
])  # fmt: skip
def test_logits_agree_with_transformers(
    precision: str, kv_dtype: torch.dtype, allowed: float, checkpoint: Path, rng: random.Random
) -> None:
    model = Mistral.load(checkpoint, CpuOps(2, precision, kv_dtype))  # type: ignore[arg-type]
    ids = torch.randint(0, 331, (400,))
    batch = step([Piece(list(range(25)), 0, 400)], BLOCK_SIZE, ids)
    found = model.forward(batch, model.allocate_cache(25, BLOCK_SIZE))
    with torch.inference_mode():
        wanted = transformers_model(checkpoint)(ids.unsqueeze(0)).logits[0]
    assert wanted.std() > 0.5
    assert (found - wanted).abs().max() < allowed


def test_two_contexts_on_two_threads_do_not_disturb_each_other(rng: random.Random) -> None:
    weight, x = random_awq(512, 256, 64), torch.randn(6, 512)
    everyone = [CpuOps(2, "int16"), CpuOps(3, "int16")]
    wanted = everyone[0].awq_linear(x, everyone[0].pack_awq(weight), torch.zeros(6, dtype=torch.bool))
    wrong: list[int] = []

    def work(ops: CpuOps) -> None:
        packed = ops.pack_awq(weight)
        for i in range(200):
            if not torch.equal(ops.awq_linear(x, packed, torch.zeros(6, dtype=torch.bool)), wanted):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(ops,)) for ops in everyone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_plain_mapping_of_the_packed_tensors_works(rng: random.Random) -> None:
    ops = CpuOps(1, "int16")
    packed, x = ops.pack_awq(random_awq(128, 24, 64)), torch.randn(2, 128)
    prompt = torch.ones(2, dtype=torch.bool)
    assert torch.equal(ops.awq_linear(x, dict(packed), prompt), ops.awq_linear(x, packed, prompt))


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    with pytest.raises(DeviceError, match=r"'mmx'.*portable"):
        CpuOps(1, isa="mmx")


def test_a_set_that_the_compiler_does_not_support_leaves_the_next_best(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load, (best, *others) = library.load, usable_instruction_sets()

    def older(isa: str) -> object:
        if isa == best:
            raise NoCompilerError("c++: error: unrecognized command-line option")
        return load(isa)

    monkeypatch.setattr(library, "load", older)
    assert CpuOps(1).name == f"{others[0]} kernels with 1 threads"
    assert f"Kernels for {best}" in caplog.text and "unrecognized" in caplog.text
    with pytest.raises(NoCompilerError, match="unrecognized"):
        CpuOps(1, isa=best)


@pytest.mark.skipif("amx" not in usable_instruction_sets(), reason="needs AMX")
def test_tiles_that_linux_refuses_are_logged_and_leave_the_next_best(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "refuse.h").write_text("#include <unistd.h>\n#define syscall(...) -1L\n")
    path = tmp_path / "isa.so"
    flags = (*FLAGS, "-include", str(tmp_path / "refuse.h"), "-shared")
    subprocess.run([*(find_compiler() or ()), *flags, str(NATIVE / "isa.cpp"), "-o", str(path)], check=True)
    monkeypatch.setattr(library, "library_paths", lambda _: [path])
    assert usable_instruction_sets.__wrapped__() == usable_instruction_sets()[1:]
    assert "has amx, but Linux refuses it" in caplog.text and "next best, avx512vnni" in caplog.text


def test_a_set_that_is_refused_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for refused, logged in ((None, False), (b"amx", True)):
        isa = SimpleNamespace(
            starling_usable_isa=lambda i: [b"avx2", b"portable", None][i],
            starling_refused_isa=lambda refused=refused: refused,
        )
        monkeypatch.setattr(library, "_open", lambda _, isa=isa: isa)
        assert usable_instruction_sets.__wrapped__() == ("avx2", "portable")
        assert ("has amx, but Linux refuses it" in caplog.text and "next best, avx2" in caplog.text) == logged


def test_head_dims_beyond_the_kernels_are_refused() -> None:
    ops = CpuOps(1)
    cache = torch.zeros(2, 1, 1, 16, 512, dtype=torch.float16)
    with pytest.raises(DeviceError, match="512"):
        ops.attention(torch.zeros(1, 1, 512), cache[0], cache[1], step([Piece([0], 0, 1)], 16), None)


def test_without_a_compiler_plain_torch_takes_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, checkpoint: Path
) -> None:
    def none(*_: object) -> None:
        raise NoCompilerError("No C++ compiler was found.")

    monkeypatch.setattr("starling.model.ops.cpu.library.load", none)
    with caplog.at_level(logging.WARNING):
        ops = cpu_ops()
    assert "several times slower" in caplog.text and "No C++ compiler" in caplog.text
    ids = torch.randint(0, 331, (9,))
    batch = step([Piece([0], 0, 9)], BLOCK_SIZE, ids)

    def logits(ops: object) -> torch.Tensor:
        model = Mistral.load(checkpoint, ops)  # type: ignore[arg-type]
        return model.forward(batch, model.allocate_cache(1, BLOCK_SIZE))

    assert error(logits(ops), logits(ReferenceOps())) < 0.05


def test_torch_computes_with_as_many_threads_as_the_kernels() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (3, 1):
            cpu_ops(threads)
            assert torch.get_num_threads() == threads
            assert TorchCpuOps().prefill_tokens == 32 * threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", usable_instruction_sets())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_value_that_is_not_finite_spoils_its_whole_row_and_no_other(
    precision: str, isa: str, rng: random.Random
) -> None:
    ops = CpuOps(1, precision, isa=isa)  # type: ignore[arg-type]
    weight = ops.pack_awq(random_awq(256, 64, 128))
    for rows in (1, 3, 20):
        x, prompt = torch.randn(rows, 256), torch.full((rows,), rows == 20)
        wanted = ops.awq_linear(x, weight, prompt)
        spoiled = rng.randrange(rows)
        x[spoiled, rng.randrange(256)] = rng.choice([torch.nan, torch.inf, -torch.inf])
        found = ops.awq_linear(x, weight, prompt)
        assert not found[spoiled].isfinite().any()
        found[spoiled] = wanted[spoiled]
        assert torch.equal(found, wanted)


TOO_MANY_THREADS = """
import resource
from starling.errors import DeviceError
from starling.model.ops.cpu import CpuOps

CpuOps(threads=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    CpuOps(threads=64)
except DeviceError as error:
    assert "64 threads could not be started" in str(error)
else:
    raise AssertionError("64 threads started")
"""


@pytest.mark.parametrize(("isa", "each"), [("avx512vnni", 16), ("amx", 64), ("neoni8mm", 32)])
def test_a_step_holds_as_many_prompt_tokens_as_keep_its_threads_busy(
    isa: str, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load_best", lambda _: (isa, *library.load("portable")))
    assert [CpuOps(threads).prefill_tokens for threads in (1, 2, 5, 17)] == [
        min(each * threads, 256) for threads in (1, 2, 5, 17)
    ]


def test_threads_that_cannot_be_started_are_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", TOO_MANY_THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plain_torch_keeps_weights_at_four_bits() -> None:
    inputs, outputs = 1024, 2048
    packed = TorchCpuOps().pack_awq(quantize(torch.randn(outputs, inputs), 128))
    assert sum(tensor.nbytes for tensor in packed.values()) < 0.6 * inputs * outputs


def test_no_compiler_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler_module, "find_compiler", lambda: None)
    with pytest.raises(NoCompilerError, match="apt-get install"):
        library_paths("isa", cache=tmp_path)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiler_module, "find_compiler", lambda: ("false",))
    with pytest.raises(NoCompilerError, match=r"false .* failed"):
        compile_ahead(tmp_path)
    assert not list(tmp_path.glob("*.so")) and not list(tmp_path.glob("build-*"))


def _count_compiles(folder: str, compiled: "multiprocessing.queues.Queue[str]") -> None:
    def fake(compiler: object, part: str, path: Path) -> None:
        compiled.put(part)
        path.write_bytes(b"library")

    compiler_module._compile = fake
    library_paths("context", "portable", cache=Path(folder))


def test_two_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    compiled = context.Queue()
    processes = [context.Process(target=_count_compiles, args=(str(tmp_path), compiled)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert {compiled.get(timeout=10), compiled.get(timeout=10)} == {"context", "portable"}
    assert compiled.empty()


def test_cores_follow_affinity_and_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(control_groups, "ROOT", tmp_path)
    monkeypatch.setattr(control_groups, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cores, "TOPOLOGY", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3, 6})
    assert cores.usable_cores() == 5
    for cpu, siblings in enumerate(["0,1", "0,1", "2,3", "2,3"]):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(siblings + "\n")
    assert cores.usable_cores() == 3
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cores.usable_cores() == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores.usable_cores() == 3


@pytest.mark.parametrize(
    ("membership", "files", "wanted"),
    [
        ("0::/system.slice/starling.service\n", {"system.slice/starling.service/cpu.max": "350000 100000"}, 4),
        ("0::/system.slice/starling.service\n", {"system.slice/cpu.max": "150000 100000", "cpu.max": "max 100000"}, 2),
        ("1:cpu,cpuacct:/box\n", {"cpu/box/cpu.cfs_quota_us": "50000", "cpu/box/cpu.cfs_period_us": "100000"}, 1),
        ("1:cpu:/of/host\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("1:memory:/box\n", {"box/cpu.max": "100000 100000", "memory/box/cpu.max": "100000 100000"}, 8),
    ],
)
def test_the_nearest_and_the_outer_quotas_count(
    membership: str, files: dict[str, str], wanted: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(control_groups, "ROOT", tmp_path)
    monkeypatch.setattr(control_groups, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cores, "TOPOLOGY", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    assert cores.usable_cores() == wanted


def test_a_model_allocates_its_cache_in_either_dtype(checkpoint: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        cache = Mistral.load(checkpoint, CpuOps(1, kv_dtype=dtype)).allocate_cache(2, BLOCK_SIZE)
        assert isinstance(cache, KVCache) and cache.keys.dtype == dtype
