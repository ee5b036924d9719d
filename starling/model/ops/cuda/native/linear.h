// y = x W^T for a 4-bit or fp16 W: the linears of every layer, and the output projection. linear_*.cu and head.cu name
// the kernels; ../linear.py packs the layout.
//
// The product runs on tensor cores with the weights as the left operand (16 output rows x 16 k) and the activations as
// the right one (16 k x 8 tokens), so that a single token costs one tile of 8 and no weight is converted twice. The
// unit of work, a *tile*, is 16 rows x 64 k: 512 bytes of nibbles, 16 bytes per lane. The order of k within a tile is
// free as long as both operands agree, so it is the one that makes activations 16-byte loads too: lane 4g + t holds,
// for rows g and g + 8 of the weights and for token g of the activations, and for step s = 0..3 and element e = 0..3,
//     k = 32 (s / 2) + 8 t + 4 (s % 2) + e.
// Word s of a lane has nibbles (by bits 4i): row g e=0, row g+8 e=0, row g e=2, row g+8 e=2, then the same of e + 1, so
// that (w >> 8j) & 0x000f000f | 0x64006400 is the pair 1024 + q of row g, and with 0x00f000f0 1024 + 16 q of row g + 8;
// a subtraction, or a multiply-add, leaves q - z, an exact fp16 integer. 9 instructions per 8 weights.
//
// Numerics, the same to the bit in every kernel here for any number of tokens: a part (64 k of one scale; 32 if the
// group is 32) is summed by the tensor core from zero, and acc = fma(scale, part, acc) in float32; K is cut into
// kSplits ranges of whole chunks (8 tiles), by its length alone; each range has its own acc, and the ranges are added
// in order. A token's column of the tensor core's product does not depend on the other columns.
//
// Weights pass through shared memory by asynchronous copies, and each lane reads what it has copied itself: how much is
// in flight does not depend on the compiler's schedule, and takes no registers. Before it waits for the previous
// kernel, a block requests its first weights (narrow), and each warp prefetches kPrefetchBytes of its weights into L2
// (up to 32 tokens), so that memory is not idle while attention runs, or while a kernel starts or ends.
//
// Two shapes of kernel:
//   narrow  a block has 2 row tiles and 4 warps for each, one per range of K, which add up in shared memory. x is read
//           straight from the nearest cache or, if the RMSNorm before it is fused, normalised into shared memory
//           while the first weights are in flight. Up to 8 tokens, best for few: warps share nothing but x.
//   wide    a block has 8 warps, each with ROW_TILES row tiles, all with the same tokens, whose activations pass
//           through shared memory too. A block takes all ranges of K one after another, or one of them (gridDim.z = 4),
//           and the last block to arrive adds them.
//
// Expected performance. The floors are for reading W once: A40 at 696 GB/s, H100 at 3.0 TB/s.
//     Starling's        rows x k        bytes      A40       H100     blocks: narrow   wide at 8 to 64 tokens
//     qkv              6144 x 4096    13.1 MB    18.8 us    4.4 us         192          192 (4 per sum)
//     out              4096 x 4096     8.7 MB    12.5 us    2.9 us         128          128 (4)
//     gate_up         28672 x 4096    61.0 MB    87.7 us   20.3 us         896          224
//     down             4096 x 14336   30.5 MB    43.8 us   10.2 us         128          128 (4)
//     head            32002 x 4096   262.2 MB     377 us   87.4 us        1001          251
// Weights in flight per block: narrow 7 tiles for each of 8 warps, 28 KiB; head 3 tiles, 48 KiB; wide_8 to wide_32 6
// tiles, 24 KiB; wide_64 4 tiles, 16 KiB; the head's wide ones 32 KiB, 16 KiB at 64 tokens. An A40 needs 5 kB in a
// multiprocessor, an H100 18 kB. Two blocks of narrow fit in a multiprocessor of either (128 registers; 35 KiB, with a
// norm 43 KiB); with a norm of two tokens, 51 KiB, or for the head, 64 KiB, only one in an A40's.
// Instructions: a multiprocessor must finish a tile every 107 cycles on an A40 and every 38 on an H100 (1.7 GHz), so in
// 430 and 152 issue slots. narrow takes 86 (head 15 for the same bytes), wide_8 112, wide_16 about 115, wide_32 about
// 145. With more tokens tensor cores are the limit: a product takes 16 cycles of a quarter of an A40's multiprocessor,
// 8 of an H100's, so a tile with 64 tokens takes 128 and 64 of all four. wide_64_tall, for prompts, has 64 products to
// some 400 other instructions for two tiles, reads each activation from shared memory for 32 rows, and requests 1 MB
// from L2 for every 134 MFLOP at k = 4096: 1.2 TB/s at the A40's peak of 149.7 TFLOPS.
#ifndef STARLING_LINEAR_H
#define STARLING_LINEAR_H

#include "norm.h"

constexpr int kSplits = 4;      // ranges of K, each summed separately
constexpr int kChunkTiles = 8;  // a range is whole chunks
constexpr int kTileK = 64;
constexpr int kPanelTileBytes = kTileK * 2;  // of one token's activations
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr u32 kPrefetchBytes = 8192;  // per warp: 64 KB a block, 8.6 MB an H100, whose memory takes 3 us for them
constexpr int kNarrowRowTiles = kWarps / kSplits;
constexpr int kNarrowTokens = 8;
constexpr int kNormBytes = kNarrowTokens * kNormWarps * 4;

#define METHOD __device__ __forceinline__

enum Epilogue { kStore = 0, kAdd = 1, kSiluMul = 2, kLogits = 3 };

struct Linear {
  const u8* weight;           // [row tiles][tiles][bytes of a tile]
  const u8* scales;           // [row tiles][chunks][bytes of a chunk's scales and zeros]
  const half_t* x;            // fp16 [tokens][k]
  const float* residual;      // float32 [tokens][k], read instead of x if the norm is fused
  const half_t* norm_weight;  // fp16 [k]
  void* out;                  // kStore: fp16 [tokens][rows]; kAdd: float32 [tokens][rows], added to; kSiluMul: fp16
                              // [tokens][rows / 2]; kLogits: float32 [tokens][rows]
  float4* partials;           // used if a block takes one range of K: [grid y][grid x][kSplits][...][kThreads]
  u32* counters;              // [grid y][grid x], all 0
  float eps;
  int tokens, rows, k;
  int tile_stride, half_stride;  // row h * 8 + g of tile r is row r * tile_stride + h * half_stride + g of the output
  int epilogue;
};

#define LINEAR_PARAMETERS                                                                                             \
  const u8 *weight, const u8 *scales, const half_t *x, const float *residual, const half_t *norm_weight, void *out,   \
      float4 *partials, u32 *counters, float eps, int tokens, int rows, int k, int tile_stride, int half_stride,      \
      int epilogue
#define LINEAR                                                                                                        \
  Linear {                                                                                                            \
    weight, scales, x, residual, norm_weight, out, partials, counters, eps, tokens, rows, k, tile_stride,             \
        half_stride, epilogue                                                                                         \
  }

DEVICE int row_tiles_of(const Linear& l) { return (l.rows + 15) / 16; }
DEVICE int tiles_of(const Linear& l) { return (l.k + kTileK - 1) / kTileK; }
DEVICE int chunks_of(const Linear& l) { return (tiles_of(l) + kChunkTiles - 1) / kChunkTiles; }
DEVICE int range_start(const Linear& l, int range) { return range * chunks_of(l) / kSplits * kChunkTiles; }  // in tiles

// The two kinds of weights: how a lane's bytes of a tile in shared memory become the left operands of 4 steps, and the
// scales of rows g and g + 8 for each part.
template <int GROUP> struct Int4 {
  static constexpr int kTileBytes = 512;
  static constexpr int kParts = GROUP == 32 ? 2 : 1;  // scales per row of a tile
  static constexpr int kGroups = kChunkTiles * kTileK / GROUP;
  // A chunk's scales, fp16 pairs of rows g and g + 8 by [group][g]; then its zeros, nibble pairs in the same order.
  static constexpr int kScaleBytes = kGroups * 40;

  static METHOD void operands(const u8* tile, const u8* scales, u32 number, u32 (&a)[4][4], float (&scale)[kParts][2]) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    const uint4 lane_words = *(const uint4*)(tile + lane * 16);
    const u32 words[4] = {lane_words.x, lane_words.y, lane_words.z, lane_words.w};
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      const u32 group = (number * kTileK + part * 32) / GROUP;
      const u32 pair = *(const u32*)(scales + (group * 8 + g) * 4);
      const u32 zero = scales[kGroups * 32 + group * 8 + g];
      const u32 low_bias = 0x64006400u + (zero & 15) * 0x00010001u;   // 1024 + z, exact
      const u32 high_bias = 0xd400d400u + (zero >> 4) * 0x00100010u;  // -(64 + z), exact
      scale[part][0] = low_half(pair);
      scale[part][1] = high_half(pair);
#pragma unroll
      for (int step = part * 4 / kParts; step < (part + 1) * 4 / kParts; step++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const u32 word = words[step] >> (8 * half);
          a[step][2 * half] = half2_sub(and_or(word, 0x000f000fu, 0x64006400u), low_bias);
          a[step][2 * half + 1] = half2_fma(and_or(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, high_bias);  // * 2^-4
        }
    }
  }
};

struct Half {
  static constexpr int kTileBytes = 2048;  // [step][lane] the four words of the operand
  static constexpr int kParts = 1;
  static constexpr int kScaleBytes = 0;

  static METHOD void operands(const u8* tile, const u8*, u32, u32 (&a)[4][4], float (&scale)[1][2]) {
#pragma unroll
    for (int step = 0; step < 4; step++) {
      const uint4 words = *(const uint4*)(tile + step * 512 + threadIdx.x % 32 * 16);
      a[step][0] = words.x, a[step][1] = words.y, a[step][2] = words.z, a[step][3] = words.w;
    }
    scale[0][0] = scale[0][1] = 1.0f;
  }
};

// One row tile's weights streaming through shared memory, for one warp: SLOTS tiles, and the scales of SCALE_SLOTS
// chunks. Each lane copies what it will read itself; only the scales need the warp to synchronise. Tiles from `end` on
// are zeros. ONCE: no other block reads these weights.
template <class W, int SLOTS, int SCALE_SLOTS, bool ONCE> struct Stream {
  static constexpr int kBytes = SLOTS * W::kTileBytes + SCALE_SLOTS * W::kScaleBytes;

  const u8 *weight, *scales;
  u8* shared;
  u32 end;

  METHOD Stream() {}
  METHOD Stream(const Linear& l, int row_tile, u32 end_, u8* shared_) {
    const int lane = threadIdx.x % 32;
    weight = l.weight + (i64)row_tile * tiles_of(l) * W::kTileBytes + lane * 16;
    scales = l.scales + (i64)row_tile * chunks_of(l) * W::kScaleBytes + lane * 16;
    shared = shared_;
    end = row_tile < row_tiles_of(l) ? end_ : 0;
  }

  // Copies tile `tile` of chunk `chunk`; the chunk's scales come with its first tile.
  METHOD void copy(u32 slot, u32 chunk, u32 tile) const {
    const int lane = threadIdx.x % 32;
    const bool valid = chunk * kChunkTiles + tile < end;
    const u8* const from = weight + (i64)chunk * (kChunkTiles * W::kTileBytes) + tile * W::kTileBytes;
#pragma unroll
    for (int i = 0; i < W::kTileBytes; i += 512)
      copy_16(shared + slot * W::kTileBytes + i + lane * 16, from + i, valid);
    if (W::kScaleBytes && tile == 0) {
#pragma unroll
      for (int i = 0; i < W::kScaleBytes; i += 512)
        if (i + lane * 16 < W::kScaleBytes)
          copy_16(scales_of(chunk) + i + lane * 16, scales + (i64)chunk * W::kScaleBytes + i, valid);
    }
  }

  static METHOD void copy_16(u8* to, const u8* from, bool valid) {
    if (ONCE) copy_async_once(to, from, valid);
    else copy_async(to, from, valid);
  }

  // Prefetches kPrefetchBytes of tiles from `first` on, and their scales, into L2.
  METHOD void prefetch_from(u32 first) const {
    if (threadIdx.x % 32 || first >= end) return;
    const u32 last = min(first + kPrefetchBytes / W::kTileBytes, end), chunk = first / kChunkTiles;
    prefetch(weight + (i64)first * W::kTileBytes, (last - first) * W::kTileBytes);
    if (W::kScaleBytes)
      prefetch(scales + (i64)chunk * W::kScaleBytes, ((last - 1) / kChunkTiles + 1 - chunk) * W::kScaleBytes);
  }

  METHOD void operands(u32 slot, u32 chunk, u32 tile, u32 (&a)[4][4], float (&scale)[W::kParts][2]) const {
    W::operands(shared + slot * W::kTileBytes, scales_of(chunk), tile, a, scale);
  }

  METHOD u8* scales_of(u32 chunk) const {
    return shared + SLOTS * W::kTileBytes + chunk % SCALE_SLOTS * W::kScaleBytes;
  }
};

// acc += scale * (a b) for one tile and 8 tokens. b[0] and b[1]: what lane 4g + t holds of token g, 8 k each.
template <int PARTS>
DEVICE void multiply(float (&acc)[4], const u32 (&a)[4][4], const float (&scale)[PARTS][2], const uint4 (&b)[2]) {
  const u32 words[4][2] = {{b[0].x, b[0].y}, {b[0].z, b[0].w}, {b[1].x, b[1].y}, {b[1].z, b[1].w}};
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int step = part * 4 / PARTS; step < (part + 1) * 4 / PARTS; step++) mma_16x8x16(sum, a[step], words[step]);
#pragma unroll
    for (int i = 0; i < 4; i++) acc[i] = fmaf(scale[part][i / 2], sum[i], acc[i]);
  }
}

DEVICE void add_to(float (&sum)[4], float4 x) { sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w; }
DEVICE void add_to(float4& sum, const float (&x)[4]) { sum.x += x[0], sum.y += x[1], sum.z += x[2], sum.w += x[3]; }

// c: a row tile's sums for 8 tokens from `first` on.
DEVICE void write_out(const Linear& l, const float (&c)[4], int row_tile, int first) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int row = row_tile * l.tile_stride + g;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const i64 token = first + 2 * t + i;
    if (token >= l.tokens) continue;
    if (l.epilogue == kSiluMul) {
      if (row < l.rows / 2) ((half_t*)l.out)[token * (l.rows / 2) + row] = float_to_half(silu(c[i]) * c[i + 2]);
      continue;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int at = row + half * l.half_stride;
      if (at >= l.rows) continue;
      if (l.epilogue == kStore) ((half_t*)l.out)[token * l.rows + at] = float_to_half(c[i + 2 * half]);
      else if (l.epilogue == kAdd) ((float*)l.out)[token * l.rows + at] += c[i + 2 * half];
      else ((float*)l.out)[token * l.rows + at] = c[i + 2 * half];
    }
  }
}

// Where the 16 bytes of chunk `chunk` (of 8) of a tile lie in a row of activations in shared memory: rows of a pair use
// different halves of the banks, so that 8 lanes that read 4 chunks of two rows touch every bank once.
DEVICE int swizzled(int row, int chunk) { return (chunk ^ ((row & 1) << 2)) * 16; }

// Grid: row tiles / 2. Shared memory: the streams of 8 warps; with NORM also kNormBytes and the normalised activations,
// tokens * tiles * 128 bytes. Tokens: 1 to kNarrowTokens.
template <class W, int SLOTS, bool NORM> DEVICE void linear_narrow(const Linear& l) {
  typedef Stream<W, SLOTS, 2, true> Weights;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int range = warp % kSplits, row_tile = blockIdx.x * kNarrowRowTiles + warp / kSplits;
  const u32 begin = range_start(l, range), end = min(range_start(l, range + 1), tiles_of(l));
  const Weights weights(l, row_tile, end, shared_memory() + warp * Weights::kBytes);
  const int row_bytes = tiles_of(l) * kPanelTileBytes;
  u8* const normed = shared_memory() + kWarps * Weights::kBytes + kNormBytes;
  if constexpr (NORM) {  // the norm's weights go where the first token will lie
    for (int i = threadIdx.x; i < l.k / 8; i += kThreads) copy_async(normed + i * 16, l.norm_weight + i * 8);
    copy_async_commit();
  }
#pragma unroll
  for (u32 i = 0; i < SLOTS - 1; i++) {
    weights.copy(i, begin / kChunkTiles, i);
    copy_async_commit();
  }
  weights.prefetch_from(begin + SLOTS - 1);
  wait_for_previous_kernel();

  if constexpr (NORM) {
    float* const partials = (float*)(normed - kNormBytes);
    for (int token = 0; token < l.tokens; token++) {
      const float partial = norm_partial(l.residual + (i64)token * l.k, l.k);
      if (lane == 0) partials[token * kNormWarps + warp] = partial;
    }
    copy_async_wait<SLOTS - 1>();
    __syncthreads();
    for (int token = l.tokens - 1; token >= 0; token--) {
      const float scale = norm_scale(partials + token * kNormWarps, l.k, l.eps);
      const float* const row = l.residual + (i64)token * l.k;
      for (int i = 4 * threadIdx.x; i < row_bytes / 2; i += 4 * kThreads) {
        const int at = i / kTileK * kPanelTileBytes + swizzled(token, i % kTileK / 8) + i % 8 * 2;
        uint2 y = make_uint2(0, 0);
        if (i < l.k) y = normalized(*(const float4*)(row + i), scale, *(const uint2*)(normed + i * 2));
        *(uint2*)(normed + token * row_bytes + at) = y;
      }
    }
    __syncthreads();
  }

  // Lanes beyond the last token repeat it: their columns are not written.
  const int token = min(g, l.tokens - 1);
  const u8* const x = NORM ? normed + token * row_bytes : (const u8*)(l.x + (i64)token * l.k + 8 * t);
  const auto load_x = [&](uint4(&b)[2], u32 tile) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const bool valid = NORM ? tile < end : tile * kTileK + 32 * j < (u32)l.k;
      const u32 at = tile * kPanelTileBytes + (NORM ? swizzled(token, 4 * j + t) : 64 * j);
      b[j] = valid ? *(const uint4*)(x + at) : make_uint4(0, 0, 0, 0);
    }
  };

  float acc[4] = {0, 0, 0, 0};
  uint4 b[2][2];  // for even and for odd tiles
  load_x(b[0], begin);
  load_x(b[1], begin + 1);
  static_assert(kChunkTiles % SLOTS == 0, "");
  for (u32 base = begin; base < end; base += SLOTS) {
    const u32 chunk = base / kChunkTiles, first = SLOTS == kChunkTiles ? 0 : base % kChunkTiles;
#pragma unroll
    for (u32 i = 0; i < SLOTS; i++) {  // from `end` on tiles are zeros
      const u32 ahead = first + i + SLOTS - 1;
      u32 a[4][4];
      float scale[W::kParts][2];
      copy_async_wait<SLOTS - 2>();
      __syncwarp();  // the scales have arrived, and no lane reads the previous slot any more
      weights.operands(i, chunk, first + i, a, scale);
      weights.copy((i + SLOTS - 1) % SLOTS, chunk + ahead / kChunkTiles, ahead % kChunkTiles);
      copy_async_commit();
      multiply(acc, a, scale, b[i % 2]);
      load_x(b[i % 2], base + i + 2);
    }
  }

  copy_async_wait<0>();
  const auto sums = [&](int of_warp) { return (float4*)(shared_memory() + of_warp * Weights::kBytes) + lane; };
  *sums(warp) = make_float4(acc[0], acc[1], acc[2], acc[3]);  // overwrites what only this lane has read
  __syncthreads();
  if (range != 0 || row_tile >= row_tiles_of(l)) return;
#pragma unroll
  for (int other = 1; other < kSplits; other++) add_to(acc, *sums(warp + other));
  write_out(l, acc, row_tile, 0);
}

// Grid: tokens / (8 * TOKEN_TILES), row tiles / (8 * ROW_TILES), 1 or kSplits. Shared memory: STAGES panels of
// PANEL tiles for all tokens; 8 * ROW_TILES streams; ROW_TILES * TOKEN_TILES * 16 bytes per thread.
template <class W, int TOKEN_TILES, int ROW_TILES, int PANEL, int STAGES> DEVICE void linear_wide(const Linear& l) {
  constexpr bool kAlone = TOKEN_TILES <= 4;  // one block takes up to 32 tokens, so no other reads its weights
  // With a single stage ahead, of a single tile, a chunk's scales have been read when the next ones are requested.
  typedef Stream<W, STAGES * PANEL, (STAGES - 1) * PANEL == 1 ? 1 : 2, kAlone> Weights;
  static_assert((STAGES - 1) * PANEL <= kChunkTiles && kChunkTiles % PANEL == 0, "");
  constexpr int kTokens = 8 * TOKEN_TILES, kPanelBytes = kTokens * PANEL * kPanelTileBytes;
  constexpr int kSums = ROW_TILES * TOKEN_TILES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_token = blockIdx.x * kTokens, first_row_tile = (blockIdx.y * kWarps + warp) * ROW_TILES;
  const bool alone = gridDim.z == 1;
  const int first_range = alone ? 0 : blockIdx.z;
  const u32 begin = range_start(l, first_range);
  const u32 end = min(range_start(l, alone ? kSplits : first_range + 1), tiles_of(l));
  u8* const panels = shared_memory();
  u8* const streams = panels + STAGES * kPanelBytes;
  Weights weights[ROW_TILES];
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
    weights[r] = Weights(l, first_row_tile + r, end, streams + (warp * ROW_TILES + r) * Weights::kBytes);
#pragma unroll
  for (int r = 0; kAlone && r < ROW_TILES; r++) weights[r].prefetch_from(begin);
  wait_for_previous_kernel();

  // Thread i copies 16 bytes of row i / (8 * PANEL) and every kRowStep-th after it; zeros beyond the last token and k.
  constexpr int kRowChunks = PANEL * 8, kRowStep = kThreads / kRowChunks;
  const int copy_row = threadIdx.x / kRowChunks, copy_chunk = threadIdx.x % kRowChunks;
  const half_t* const copy_from = l.x + (i64)(first_token + copy_row) * l.k + copy_chunk * 8;
  const int copy_to = copy_row * PANEL * kPanelTileBytes + copy_chunk / 8 * kPanelTileBytes +
                      swizzled(copy_row, copy_chunk % 8);
  const auto copy_stage = [&](u32 stage, u32 tile) {
#pragma unroll
    for (int i = 0; i < PANEL; i++)
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
        weights[r].copy(stage * PANEL + i, tile / kChunkTiles, tile % kChunkTiles + i);
    const bool inside = tile * kTileK + copy_chunk * 8 < (u32)l.k;
#pragma unroll
    for (int row = 0; row < kTokens; row += kRowStep)
      if (kRowStep <= kTokens || copy_row < kTokens)
        copy_async(panels + stage * kPanelBytes + copy_to + row * PANEL * kPanelTileBytes,
                   copy_from + (i64)row * l.k + tile * kTileK, inside && first_token + copy_row + row < l.tokens);
    copy_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) copy_stage(stage, begin + stage * PANEL);

  // Each thread's sums over the previous ranges, in shared memory because registers are scarce.
  float4* const totals = (float4*)(streams + kWarps * ROW_TILES * Weights::kBytes) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kSums; i++) totals[i * kThreads] = make_float4(0, 0, 0, 0);

  float acc[ROW_TILES][TOKEN_TILES][4] = {};
  int range = first_range;
  u32 stage = 0, range_end = begin;
  for (u32 base = begin; base < end; base += PANEL) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // this stage has arrived, and no warp reads the previous one any more
#pragma unroll
    for (int i = 0; i < PANEL; i++) {
      u32 a[ROW_TILES][4][4];
      float scale[ROW_TILES][W::kParts][2];
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
        weights[r].operands(stage * PANEL + i, base / kChunkTiles, base % kChunkTiles + i, a[r], scale[r]);
      if (i == 0) {
        if (STAGES == 2) __syncwarp();
        copy_stage(stage == 0 ? STAGES - 1 : stage - 1, base + (STAGES - 1) * PANEL);
      }
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; n++) {
        const u8* const row = panels + stage * kPanelBytes + ((8 * n + g) * PANEL + i) * kPanelTileBytes;
        const uint4 b[2] = {*(const uint4*)(row + swizzled(g, t)), *(const uint4*)(row + swizzled(g, 4 + t))};
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) multiply(acc[r][n], a[r], scale[r], b);
      }
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
    while (range_end <= base) range_end = range_start(l, ++range);
    if (base + PANEL >= range_end || base + PANEL >= end) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; n++) {
          add_to(totals[(r * TOKEN_TILES + n) * kThreads], acc[r][n]);
#pragma unroll
          for (int i = 0; i < 4; i++) acc[r][n][i] = 0;
        }
    }
  }
  copy_async_wait<0>();

  if (!alone) {
    const int block = blockIdx.y * gridDim.x + blockIdx.x;
    float4* const partials = l.partials + (i64)block * kSplits * kSums * kThreads + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums; i++) partials[(blockIdx.z * kSums + i) * kThreads] = totals[i * kThreads];
    if (!last_to_arrive(l.counters + block, kSplits, (int*)panels)) return;
#pragma unroll
    for (int i = 0; i < kSums; i++) {
      float sum[4] = {0, 0, 0, 0};
#pragma unroll
      for (int z = 0; z < kSplits; z++) add_to(sum, partials[(z * kSums + i) * kThreads]);
      totals[i * kThreads] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; n++) {
      const float4 x = totals[(r * TOKEN_TILES + n) * kThreads];
      const float sum[4] = {x.x, x.y, x.z, x.w};
      if (first_row_tile + r < row_tiles_of(l)) write_out(l, sum, first_row_tile + r, first_token + 8 * n);
    }
}

#endif
