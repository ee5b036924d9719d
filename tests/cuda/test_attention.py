"""Attention against the plain-torch oracle: emulated at small shapes, on a GPU at Starling's full ones."""

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from starling.errors import DeviceError
from starling.model.batch import Batch
from starling.model.ops.cuda.attention import AttentionKernels
from starling.model.ops.cuda.driver import DriverModule
from starling.model.ops.cuda.module import Module
from starling.model.ops.reference import ReferenceOps
from tests.cuda.emulator import EmulatedModule
from tests.cuda.ptx import ptx_of
from tests.model.paged import Piece, random_table, step

REFERENCE = ReferenceOps()
GUARD = 4096  # bytes of 0xff on either side of what the kernels' class allocates
Shape = tuple[int, int, int]  # heads, kv_heads, head_dim
EMULATED = [(8, 2, 128), (9, 3, 64), (4, 4, 16), (8, 1, 80), (4, 1, 112)]


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever torch.empty returns holds NaN (0xff), between guards that must still be intact at the end."""
    whole: list[tuple[torch.Tensor, int]] = []

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        bytes_wanted = torch.Size(shape).numel() * dtype.itemsize
        buffer = torch.full((bytes_wanted + 2 * GUARD,), 0xFF, dtype=torch.uint8, device=device)
        whole.append((buffer, bytes_wanted))
        return buffer[GUARD : GUARD + bytes_wanted].view(dtype).view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    assert whole
    for buffer, used in whole:
        assert (buffer[:GUARD] == 0xFF).all() and (buffer[GUARD + used :] == 0xFF).all()


def emulated(shape: Shape, ranges: int) -> AttentionKernels:
    return AttentionKernels(EmulatedModule, torch.device("cpu"), *shape, 1024, ranges)


def random_cache(
    pieces: list[Piece],
    blocks: int,
    kv_heads: int,
    block_size: int,
    dim: int,
    device: str = "cpu",
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values at the earlier positions that the step can see, NaN everywhere else."""
    cache = torch.full((2, blocks, kv_heads, block_size, dim), torch.nan, dtype=torch.float16, device=device)
    for piece in pieces:
        first = 0 if window is None else max(0, piece.start - window + 1)
        seen = range(first, piece.start)
        slots = torch.tensor([piece.table[p // block_size] * block_size + p % block_size for p in seen])
        if len(slots):
            written = torch.randn(2, len(slots), kv_heads, dim, device=device).half()
            cache[:, slots // block_size, :, slots % block_size] = written.transpose(0, 1)
    keys, values = cache
    return keys, values


def mixed_pieces(rng: random.Random, spans: list[tuple[int, int]], block_size: int, blocks: int) -> list[Piece]:
    free = list(range(blocks))
    pieces = [Piece(random_table(rng, start + count, block_size, free), start, count) for start, count in spans]
    rng.shuffle(pieces)
    return pieces


def without_passed_blocks(batch: Batch, window: int | None, block_size: int) -> Batch:
    """Table entries of blocks that no token of the step sees any more are -1, as the cache's owner leaves them."""
    tables = batch.block_tables.clone()
    if window is not None:
        for request, context in enumerate(batch.context_lens.tolist()):
            first = context - int(batch.query_starts[request + 1] - batch.query_starts[request])
            tables[request, : max(0, first - window + 1) // block_size] = -1
    return replace(batch, block_tables=tables)


def check(
    found: torch.Tensor, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int | None
) -> None:
    """Against the oracle in float32, on the same fp16 queries, keys and values.

    Rounding weights to fp16: 2^-11 of each, so at most 2^-11 of the attended |values|; the output: 2^-11 again.
    Scores are sums of D exact products in float32, and powers of two are good to 2^-22: together less than 2^-11 for
    scores of a few tens. All are relative to the attended |values|. A weight below 2^-14 of the largest is rounded to a
    multiple of 2^-24 instead: 2^-25 of every |value| in sight, which matters where the attended value is close to 0.
    """
    wanted = REFERENCE.attention(q.float(), keys.float(), values.float(), batch, window)
    size = REFERENCE.attention(q.float(), keys.float(), values.float().abs(), batch, window)
    mean = REFERENCE.attention(torch.zeros_like(q).float(), keys.float(), values.float().abs(), batch, window)
    seen = (batch.positions + 1).clamp(max=window or len(keys) * keys.shape[2])[:, None]
    assert found.shape == wanted.shape and found.dtype == torch.float16
    assert ((found.float() - wanted).abs() <= 3 * 2**-11 * size + 2**-25 * mean * seen + 2**-24).all()  # False for NaN


@pytest.mark.parametrize(("shape", "named"), [((8, 2, 256), "head_dim 256"), ((8, 2, 40), "40"), ((17, 1, 64), "17")])
def test_a_shape_that_the_kernels_do_not_support_is_an_error(shape: Shape, named: str) -> None:
    with pytest.raises(DeviceError, match=rf"{named}.*a multiple of 16 up to 128, and at most 16"):
        emulated(shape, ranges=1)


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("shape", EMULATED)
def test_a_mixed_step(rng: random.Random, guards: None, shape: Shape, window: int | None) -> None:
    """A prompt and a later chunk, decodes near and far, drafts; scattered blocks, NaN wherever nothing was written."""
    heads, kv_heads, dim = shape
    kernels = emulated(shape, ranges=rng.choice([1, 2, 3, 7, 20, 64]))
    block_size, blocks = rng.choice([16, 32, 5]), 400
    spans = [(0, rng.randint(17, 40)), (rng.randint(0, 400), 1), (rng.randint(90, 150), rng.randint(2, 16)), (0, 1)]
    spans.append((rng.randint(30, 150), rng.randint(17, 25)))
    pieces = mixed_pieces(rng, spans, block_size, blocks)
    batch = without_passed_blocks(step(pieces, block_size), window, block_size)
    keys, values = random_cache(pieces, blocks, kv_heads, block_size, dim, window=window)
    qkv = (torch.randn(batch.positions.numel(), (heads + 2 * kv_heads) * dim) * rng.choice([0.1, 1, 3])).half()
    rotary = torch.randn(1024, dim).clamp(-1, 1)

    oracle_keys, oracle_values = keys.float(), values.float()
    wanted_q = REFERENCE.rotate_and_cache(qkv.float(), batch, rotary, oracle_keys, oracle_values)
    q = kernels.rotate_and_cache(qkv, batch, rotary, keys, values)
    close = {"rtol": 2**-11 * 1.001, "atol": 1e-6, "equal_nan": True}  # one rounding to fp16, and float32's own
    torch.testing.assert_close(q.float(), wanted_q, **close)
    torch.testing.assert_close(keys.float(), oracle_keys, **close)
    assert torch.equal(values.nan_to_num(-7), oracle_values.half().nan_to_num(-7))

    plan = kernels.plan(batch, window)
    for _ in range(2):  # as in two layers: what one leaves behind must not disturb the next
        check(kernels.attention(q, keys, values, batch, plan), q, keys, values, batch, window)


@pytest.mark.parametrize("dim", [64, 128])
def test_shared_memory_is_free_of_bank_conflicts(rng: random.Random, dim: int) -> None:
    """Except at the end of a prompt's tile, which reads the halves of its sums one by one."""
    module = EmulatedModule("attention")
    kernels = AttentionKernels(lambda _source: module, torch.device("cpu"), 4, 1, dim, 1024, 6)
    for spans in ([(300, 1), (70, 3)], [(100, 60)]):  # few rows, and a prompt
        pieces = mixed_pieces(rng, spans, 16, 60)
        batch = step(pieces, 16)
        keys, values = random_cache(pieces, 60, 1, 16, dim)
        q = torch.randn(batch.positions.numel(), 4, dim).half()
        plan = kernels.plan(batch, None)
        found = module.count(partial(kernels.attention, q, keys, values, batch, plan))
        assert found.least > 1000
        assert found.taken <= 1.06 * found.least


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("shape", [(4, 1, 128), (3, 1, 64)])
def test_a_token_gets_the_same_whatever_shares_its_step(rng: random.Random, shape: Shape, window: int | None) -> None:
    """Alone, as one of several drafts, in prompt chunks cut anywhere, among others, however the work is spread."""
    check_invariance(rng, lambda ranges: emulated(shape, ranges), shape, window, 420, "cpu")


def check_invariance(
    rng: random.Random,
    make: Callable[[int], AttentionKernels],
    shape: Shape,
    window: int | None,
    context: int,
    device: str,
) -> None:
    heads, kv_heads, dim = shape
    block_size, blocks, last = 16, 3 * context // 16 + 10, 40
    free = list(range(blocks))
    table, other = (random_table(rng, context, block_size, free) for _ in range(2))
    everything = [Piece(table, context, 0), Piece(other, context, 0)]
    keys, values = random_cache(everything, blocks, kv_heads, block_size, dim, device)
    queries = torch.randn(context, heads, dim, device=device).half()  # of the request in `table`, by position

    def attended(pieces: list[Piece], ranges: int) -> dict[int, torch.Tensor]:
        batch = on(step(pieces, block_size), device)
        kernels = make(ranges)
        rows = [
            queries[piece.start : piece.start + piece.count]
            if piece.table is table
            else torch.randn(piece.count, heads, dim, device=device).half()
            for piece in pieces
        ]
        out = kernels.attention(torch.cat(rows), keys, values, batch, kernels.plan(batch, window))
        start, found = 0, {}
        for piece in pieces:
            if piece.table is table:
                found.update({piece.start + i: out[start + i] for i in range(piece.count)})
            start += piece.count
        return found

    chunk = attended([Piece(table, context - last, last)], 3)  # as a prompt
    assert len(chunk) == last
    cut = rng.randint(17, last - 1)
    ways = [
        attended([Piece(table, context - last + cut - 17, 17)], 1),
        attended([Piece(other, 100, 25), Piece(table, context - cut, cut), Piece(other, 300, 1)], 2),
        attended([Piece(table, context - 9, rng.randint(2, 9))], 5),
        attended([Piece(other, 17, 3), Piece(table, context - 16, 16)], rng.choice([1, 4, 9])),
        *(attended([Piece(table, context - rng.randint(1, last), 1)], ranges) for ranges in (1, 2, 64)),
        attended([Piece(other, 350, 2), Piece(other, 5, 1), Piece(table, context - 1, 1), Piece(other, 40, 1)], 3),
    ]
    for way in ways:
        for position, row in way.items():
            assert torch.equal(row, chunk[position]), position


def on(batch: Batch, device: str) -> Batch:
    tensors = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **tensors)


def test_padding_is_neither_read_nor_written(rng: random.Random, guards: None) -> None:
    """A bucket's batch: slots of -1, then requests with no tokens, or with tokens and no context."""
    heads, kv_heads, dim, block_size = 8, 2, 64, 16
    kernels = emulated((heads, kv_heads, dim), ranges=6)
    pieces = mixed_pieces(rng, [(130, 1), (20, 1)], block_size, 40)
    batch, padding = step(pieces, block_size), 3
    int32 = torch.int32
    none, junk = torch.full((padding,), -1, dtype=int32), torch.full((padding,), 2**30, dtype=int32)
    padded = replace(
        batch,
        token_ids=torch.zeros(2 + padding, dtype=torch.int64),
        positions=torch.cat([batch.positions, junk]),
        slots=torch.cat([batch.slots, none]),
        query_starts=torch.cat([batch.query_starts, torch.tensor([2, 2, 2 + padding], dtype=int32)]),
        context_lens=torch.cat([batch.context_lens, torch.tensor([0, 9, 0], dtype=int32)]),
        block_tables=torch.cat([batch.block_tables, junk[:, None].expand(-1, batch.block_tables.shape[1])]),
        prompt_tokens=torch.zeros(2 + padding, dtype=torch.bool),
    )
    keys, values = random_cache(pieces, 40, kv_heads, block_size, dim)
    qkv = torch.randn(2 + padding, (heads + 2 * kv_heads) * dim).half()
    rotary = torch.randn(256, dim)
    outs = []
    for each in (batch, padded):
        own_keys, own_values = keys.clone(), values.clone()
        count = each.positions.numel()
        q = kernels.rotate_and_cache(qkv[:count], each, rotary, own_keys, own_values)
        plan = kernels.plan(each, None)
        out = kernels.attention(q, own_keys, own_values, each, plan)
        at_once = kernels.attend(qkv[:count], each, plan, rotary, keys.clone(), values.clone())
        assert torch.equal(at_once[:2], out[:2])
        assert all((row.view(torch.int16) == -1).all() for row in (q[2:], out[2:], at_once[2:]))  # as they were
        outs.append((q[:2], out[:2], own_keys.nan_to_num(-7), own_values.nan_to_num(-7)))
    for alone, with_padding in zip(*outs, strict=True):
        assert torch.equal(alone, with_padding)


@pytest.mark.parametrize(("group", "kv_heads"), [(4, 8), (3, 3), (1, 2), (16, 1), (7, 1)])
def test_the_plan_covers_each_row_once(rng: random.Random, guards: None, group: int, kv_heads: int) -> None:
    """Any step: tiles hold every real token once, their items follow each other, ranges begin where they must."""
    for _ in range(8):
        window = rng.choice([None, 1, 64, 500])
        counts = [rng.choice([0, 1, 1, 2, 16, 17, rng.randint(1, 90)]) for _ in range(rng.choice([1, 3, 64, 300]))]
        contexts = [count + rng.randint(0, 900) if count else 0 for count in counts]
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        tokens, ranges = int(starts[-1]), rng.choice([1, 5, 84, 300])
        kernels = AttentionKernels(EmulatedModule, torch.device("cpu"), group * kv_heads, kv_heads, 16, 1024, ranges)
        batch = Batch(
            token_ids=torch.zeros(tokens, dtype=torch.int64),
            positions=torch.zeros(tokens, dtype=torch.int32),
            slots=torch.zeros(tokens, dtype=torch.int32),
            query_starts=starts,
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.zeros(len(counts), 64, dtype=torch.int32),
            prompt_tokens=torch.zeros(tokens, dtype=torch.bool),
            logit_rows=torch.arange(tokens),
        )
        plan = kernels.plan(batch, window)
        items, prompts = plan.counts.tolist()
        assert plan.prompt_tiles is not None or not prompts
        prompt_tiles = [] if plan.prompt_tiles is None else plan.prompt_tiles[:prompts].tolist()
        seen, item, few = [0] * tokens, 0, 0
        for tiles, rows in ((plan.tiles.tolist(), 16), (prompt_tiles, 64)):
            for token, held, position, request, first_split, splits, first_item, fresh in tiles:
                if rows == 16 and item == items:
                    break
                assert 1 <= held <= rows // group and starts[request] <= token < token + held <= starts[request + 1]
                assert fresh == contexts[request] - counts[request]
                assert position == contexts[request] - counts[request] + token - starts[request]
                assert first_split == (0 if window is None else max(0, position - window + 1)) // 128
                assert splits == (position + held - 1) // 128 + 1 - first_split
                seen[token : token + held] = [times + 1 for times in seen[token : token + held]]
                if rows == 16:
                    assert first_item == item
                    item += splits * kv_heads
                    few += 1
        assert item == items and seen == [1] * tokens
        assert (plan.counters[:few] == 0).all()
        reached = 0
        for row in plan.ranges.tolist():
            tile, (index, head, split, begin, end) = row[:8], row[8:13]
            if begin == end:
                continue
            assert begin == reached and tile == plan.tiles[index].tolist()
            assert tile[6] + head * tile[5] + split == begin and head < kv_heads and split < tile[5]
            assert end - begin in (items // min(ranges, items), items // min(ranges, items) + 1)
            reached = end
        assert reached == items


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("shape", [(8, 2, 128), (9, 3, 64), (8, 1, 80)])
def test_rotating_within_attention(rng: random.Random, guards: None, shape: Shape, window: int | None) -> None:
    """A step of few tokens, or of decodes, writes and returns what the two operations do, one after the other."""
    heads, kv_heads, dim = shape
    for _ in range(2):
        block_size, blocks = rng.choice([16, 32, 5]), 1300
        spans = [
            (rng.choice([rng.randint(0, 300), 120, 127]), count)
            for count in rng.choice([(1, 1, 5), (9,), (3, 1, 12), (1,) * 20])
        ]
        pieces = mixed_pieces(rng, spans, block_size, blocks)
        batch = without_passed_blocks(step(pieces, block_size), window, block_size)
        batch = replace(batch, decodes=all(count == 1 for _, count in spans))
        kernels = emulated(shape, ranges=rng.choice([1, 3, 40]))
        caches = [random_cache(pieces, blocks, kv_heads, block_size, dim, window=window)]
        caches.append((caches[0][0].clone(), caches[0][1].clone()))
        qkv = torch.randn(batch.positions.numel(), (heads + 2 * kv_heads) * dim).half()
        rotary = torch.randn(512, dim).clamp(-1, 1)
        plan = kernels.plan(batch, window)
        assert plan.prompt_tiles is None
        q = kernels.rotate_and_cache(qkv, batch, rotary, *caches[0])
        wanted = kernels.attention(q, *caches[0], batch, plan)
        check(wanted, q, *caches[0], batch, window)
        assert torch.equal(kernels.attend(qkv, batch, plan, rotary, *caches[1]), wanted)
        for found, cache in zip(caches[1], caches[0], strict=True):
            assert torch.equal(found.nan_to_num(-7), cache.nan_to_num(-7))


@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code(arch: int) -> None:
    """16-byte asynchronous copies, matrices by ldmatrix, tensor cores."""
    ptx = ptx_of("attention", arch)
    for name, dim in (("attention_64", 64), ("attention_128", 128)):
        body = ptx[ptx.index(f".entry {name}(") :]
        body = body[: body.index("\n}")]
        copies = re.findall(r"cp\.async\.\w+\.shared\.global [^;]+, (\d+), ", body)
        assert copies and set(copies) == {"16"}
        assert body.count("mma.sync.aligned.m16n8k16") >= 2 * 2 * (2 * dim // 16 + dim // 8)  # two paths
        assert body.count("ldmatrix.sync.aligned.m8n8.x4.shared") >= 2 * 2 * dim // 16
        assert body.count("ldmatrix.sync.aligned.m8n8.x4.trans.shared") >= 2 * dim // 8


def on_gpu(shape: Shape, ranges: int | None = None) -> AttentionKernels:
    def load(source: str) -> Module:
        return DriverModule.on_gpu(source, torch.device("cuda"))

    return AttentionKernels(load, torch.device("cuda"), *shape, 8192, ranges)


FULL = [(32, 8, 128), (9, 3, 64)]  # Starling and the demo


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("shape", FULL)
def test_full_shapes(rng: random.Random, shape: Shape, block_size: int, window: int | None) -> None:
    heads, kv_heads, dim = shape
    kernels, blocks = on_gpu(shape), 160_000 // block_size
    alone = [[(rng.randint(0, 8191), 1)], [(0, 2048)], [(6000, 700)], [(8000, 5)], [(8191, 1)], [(127, 1)], [(128, 1)]]
    decodes = [[(rng.randint(0, 2000), 1) for _ in range(count)] for count in (2, 8, 33, 64)]
    mixed = [[(rng.randint(0, 1500), rng.choice([1, 1, 1, 4, 60, 300])) for _ in range(20)]]
    for spans in alone + decodes + mixed:
        pieces = mixed_pieces(rng, spans, block_size, blocks)
        batch = without_passed_blocks(step(pieces, block_size), window, block_size)
        batch = on(batch, "cuda")
        keys, values = random_cache(pieces, blocks, kv_heads, block_size, dim, "cuda", window)
        qkv = torch.randn(batch.positions.numel(), (heads + 2 * kv_heads) * dim, device="cuda").half()
        rotary = torch.randn(8192, dim, device="cuda").clamp(-1, 1)
        oracle_keys, oracle_values = keys.float(), values.float()
        wanted_q = REFERENCE.rotate_and_cache(qkv.float(), batch, rotary, oracle_keys, oracle_values)
        q = kernels.rotate_and_cache(qkv, batch, rotary, keys, values)
        torch.testing.assert_close(q.float(), wanted_q, rtol=2**-11 * 1.001, atol=1e-6)
        plan = kernels.plan(batch, window)
        for _ in range(2):
            out = kernels.attention(q, keys, values, batch, plan)
            check(out, q, keys, values, batch, window)
            assert torch.equal(kernels.attend(qkv, batch, plan, rotary, keys, values), out)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("shape", FULL)
def test_invariance_at_full_shapes(rng: random.Random, shape: Shape, window: int | None) -> None:
    def make(ranges: int) -> AttentionKernels:
        return on_gpu(shape, rng.choice([ranges, None]))

    check_invariance(rng, make, shape, window, 8000, "cuda")
