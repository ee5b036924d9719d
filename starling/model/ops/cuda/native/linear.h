// y = x W^T for a W of 4 bits, or of fp16: every layer of the model and its output projection. linear_*.cu and head.cu
// name the kernels; the layout is packed by ../linear.py.
//
// The product runs on tensor cores with the weights as the left operand (16 output rows x 16 k) and the activations as
// the right one (16 k x 8 tokens), so that a single token costs one tile of 8 and no weight is converted twice. The unit
// of work, a *tile*, is 16 rows x 64 k: 512 bytes of nibbles, 16 bytes of each lane. The order of k within a tile is
// free as long as both operands agree, so it is the one that makes activations 16-byte loads too: lane 4g + t holds,
// for rows g and g + 8 of the weights and for token g of the activations, and for step s = 0..3 and element e = 0..3,
//     k = 32 (s / 2) + 8 t + 4 (s % 2) + e.
// Word s of a lane has nibbles (by bits 4i): row g e=0, row g+8 e=0, row g e=2, row g+8 e=2, then the same of e + 1, so
// that (w >> 8j) & 0x000f000f | 0x64006400 is the pair 1024 + q of row g, and with 0x00f000f0 1024 + 16 q of row g + 8;
// a subtraction, or a multiplication-addition, leaves q - z, an exact fp16 integer. 9 instructions per 8 weights.
//
// Numerics, the same to the bit in every kernel here whatever the number of tokens: a part (64 k of one scale; 32 where
// the group is 32) is summed by the tensor core from zero, and acc = fma(scale, part, acc) in float32; K is cut into
// kSplits ranges of whole chunks (8 tiles) by its length only; each range has its own acc, and the ranges are added in
// order. A token's column of the tensor core's product does not depend on the other columns.
//
// Two shapes of kernel:
//   narrow  a block has 2 row tiles and 4 warps for each, one per range of K, which add up in shared memory. x is read
//           straight from the nearest cache, or, where the RMSNorm before it is fused, normalised into shared memory.
//           For up to 8 tokens, best for few: nothing is shared between warps but x.
//   wide    a block has 8 warps, each with ROW_TILES row tiles, all with the same tokens, whose activations come in
//           panels of k through shared memory, three under way. All ranges of K one after another, or one block for
//           each (gridDim.z = 4), and the last to arrive adds them.
//
// What it should reach (the floors are those of reading W once; A40 at 696 GB/s, H100 at 3.0 TB/s):
//     Starling's        rows x k        bytes      A40       H100     blocks of narrow
//     qkv              6144 x 4096    13.1 MB    18.8 us    4.4 us    192
//     out              4096 x 4096     8.7 MB    12.5 us    2.9 us    128
//     gate_up         28672 x 4096    61.0 MB    87.7 us   20.3 us    896
//     down             4096 x 14336   30.5 MB    43.8 us   10.2 us    128
//     head            32002 x 4096   262.2 MB     377 us   87.4 us   1001
// Bytes in flight, narrow: 8 tiles of 512 bytes in registers per warp, 8 warps: 32 KiB per block, so at least as many
// per multiprocessor (H100 wants 18 kB, A40 5 kB), and 64 KiB with two blocks. Instructions: see COUNTS below.
#ifndef STARLING_LINEAR_H
#define STARLING_LINEAR_H

#include "norm.h"

constexpr int kSplits = 4;      // ranges of K, each summed on its own
constexpr int kChunkTiles = 8;  // a range is whole chunks
constexpr int kTileK = 64;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kNarrowRowTiles = kWarps / kSplits;
constexpr int kReductionBytes = kThreads * 16;
constexpr int kNormBytes = 8 * kNormWarps * 4;

#define METHOD __device__ __forceinline__

enum Epilogue { kStore = 0, kAdd = 1, kSiluMul = 2, kLogits = 3 };

struct Linear {
  const uint4* weight;       // [row tiles][tiles][words][32 lanes]; words: 1 for 4 bits, 4 (by step) for fp16
  const u32* scales;         // fp16 pairs of rows g and g + 8: [row tiles][chunks][8 g][groups in a chunk]
  const u8* zeros;           // nibble pairs of rows g and g + 8, in the same order
  const half_t* x;           // fp16 [tokens][k]
  const float* residual;     // float32 [tokens][k], read instead of x where the norm is fused
  const half_t* norm_weight; // fp16 [k]
  void* out;                 // kStore: fp16 [tokens][rows]; kAdd: float32 [tokens][rows], added to; kSiluMul: fp16
                             // [tokens][rows / 2]; kLogits: float32 [tokens][rows]
  float4* partials;          // where one block takes one range of K: [grid y][grid x][kSplits][...][kThreads]
  u32* counters;             // [grid y][grid x], all 0
  float eps;
  int tokens, rows, k;
  int tile_stride, half_stride;  // row h * 8 + g of tile r is row r * tile_stride + h * half_stride + g of the output
  int epilogue;

};

#define LINEAR_PARAMETERS                                                                                             \
  const uint4 *weight, const u32 *scales, const u8 *zeros, const half_t *x, const float *residual,                    \
      const half_t *norm_weight, void *out, float4 *partials, u32 *counters, float eps, int tokens, int rows, int k,  \
      int tile_stride, int half_stride, int epilogue
#define LINEAR                                                                                                        \
  Linear {                                                                                                            \
    weight, scales, zeros, x, residual, norm_weight, out, partials, counters, eps, tokens, rows, k, tile_stride,      \
        half_stride, epilogue                                                                                         \
  }

DEVICE int row_tiles_of(const Linear& l) { return (l.rows + 15) / 16; }
DEVICE int tiles_of(const Linear& l) { return (l.k + kTileK - 1) / kTileK; }
DEVICE int chunks_of(const Linear& l) { return (tiles_of(l) + kChunkTiles - 1) / kChunkTiles; }
DEVICE int range_start(const Linear& l, int range) { return range * chunks_of(l) / kSplits * kChunkTiles; }  // in tiles

DEVICE uint4 no_words() { return make_uint4(0, 0, 0, 0); }

// N bytes at an address that is a multiple of N, 1 to 64, as little-endian words.
template <int N> DEVICE void load_bytes(u32 (&words)[(N + 3) / 4], const u8* from) {
  if constexpr (N >= 16) {
#pragma unroll
    for (int i = 0; i < N / 16; i++) {
      const uint4 x = *(const uint4*)(from + 16 * i);
      words[4 * i] = x.x, words[4 * i + 1] = x.y, words[4 * i + 2] = x.z, words[4 * i + 3] = x.w;
    }
  } else if constexpr (N == 8) {
    const uint2 x = *(const uint2*)from;
    words[0] = x.x, words[1] = x.y;
  } else if constexpr (N == 4) {
    words[0] = *(const u32*)from;
  } else if constexpr (N == 2) {
    words[0] = *(const u16*)from;
  } else {
    words[0] = *from;
  }
}

// One row tile's weights as they stream by, RING tiles under way in registers; tiles outside of [begin, end) are zeros.
template <int GROUP, int RING> struct Int4Stream {
  static constexpr int kRing = RING;
  static constexpr int kParts = GROUP == 32 ? 2 : 1;      // scales of a row in a tile
  static constexpr int kGroups = RING * kTileK / GROUP;   // groups that RING tiles touch
  static constexpr int kChunkGroups = kChunkTiles * kTileK / GROUP;
  static_assert(kGroups > 0 && kChunkTiles % RING == 0, "");

  uint4 tiles[RING];
  u32 scales[kGroups], next_scales[kGroups], zeros[(kGroups + 3) / 4], next_zeros[(kGroups + 3) / 4];
  const uint4* weight_at;  // of tile `at`
  const u32* scales_at;    // of the row tile
  const u8* zeros_at;
  int at, end;

  METHOD void start(const Linear& l, int row_tile, int begin, int end_) {
    const int lane = threadIdx.x % 32;
    const i64 groups = ((i64)row_tile * chunks_of(l) * 8 + lane / 4) * kChunkGroups;
    at = begin, end = row_tile < row_tiles_of(l) ? end_ : 0;
    weight_at = l.weight + ((i64)row_tile * tiles_of(l) + begin) * 32 + lane;
    scales_at = l.scales + groups;
    zeros_at = l.zeros + groups;
#pragma unroll
    for (int i = 0; i < RING; i++) tiles[i] = load_once(weight_at + i * 32, at + i < end);
    load_scales(at);
  }

  // Before tiles at .. at + RING - 1.
  METHOD void turn() {
#pragma unroll
    for (int i = 0; i < kGroups; i++) scales[i] = next_scales[i], zeros[i / 4] = next_zeros[i / 4];
    load_scales(at + RING);
  }

  METHOD void load_scales(int tile) {
    if (tile < end) {
      const int group = tile / kChunkTiles * 8 * kChunkGroups + tile % kChunkTiles * kTileK / GROUP;
      load_bytes<4 * kGroups>(next_scales, (const u8*)(scales_at + group));
      load_bytes<kGroups>(next_zeros, zeros_at + group);
    } else {
#pragma unroll
      for (int i = 0; i < kGroups; i++) next_scales[i] = next_zeros[i / 4] = 0;
    }
  }

  // Tile at + RING + i takes the place of tile at + i; after the last of the ring, they are the ring.
  METHOD void replace(int i) {
    tiles[i] = load_once(weight_at + (RING + i) * 32, at + RING + i < end);
    if (i == RING - 1) at += RING, weight_at += RING * 32;
  }

  // Slot i's tile as left operands of 4 steps, and the scales of rows g and g + 8 of each part.
  METHOD void operands(int i, u32 (&a)[4][4], float (&scale)[kParts][2]) const {
    const u32 words[4] = {tiles[i].x, tiles[i].y, tiles[i].z, tiles[i].w};
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      const int group = (i * kTileK + part * 32) / GROUP;
      const u32 zero = zeros[group / 4] >> (group % 4 * 8);
      const u32 low_bias = 0x64006400u | (zero & 15) * 0x00010001u;            // 1024 + z
      const u32 high_bias = 0xd400d400u | (zero >> 4 & 15) * 0x00100010u;      // -(64 + z)
      scale[part][0] = low_half(scales[group]);
      scale[part][1] = high_half(scales[group]);
#pragma unroll
      for (int step = part * 4 / kParts; step < (part + 1) * 4 / kParts; step++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const u32 word = words[step] >> (8 * half);
          a[step][2 * half] = half2_sub(and_or(word, 0x000f000fu, 0x64006400u), low_bias);
          a[step][2 * half + 1] = half2_fma(and_or(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, high_bias);  // * 2^-4
        }
      }
    }
  }
};

template <int RING> struct HalfStream {
  static constexpr int kRing = RING;
  static constexpr int kParts = 1;

  uint4 tiles[RING][4];
  const uint4* weight_at;
  int at, end;

  METHOD void start(const Linear& l, int row_tile, int begin, int end_) {
    at = begin, end = row_tile < row_tiles_of(l) ? end_ : 0;
    weight_at = l.weight + ((i64)row_tile * tiles_of(l) + begin) * 128 + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < RING; i++) load(i, i);
  }

  METHOD void load(int slot, int i) {
#pragma unroll
    for (int step = 0; step < 4; step++)
      tiles[slot][step] = load_once(weight_at + i * 128 + step * 32, at + i < end);
  }

  METHOD void turn() {}

  METHOD void replace(int i) {
    load(i, RING + i);
    if (i == RING - 1) at += RING, weight_at += RING * 128;
  }

  METHOD void operands(int i, u32 (&a)[4][4], float (&scale)[1][2]) const {
#pragma unroll
    for (int step = 0; step < 4; step++) {
      a[step][0] = tiles[i][step].x, a[step][1] = tiles[i][step].y;
      a[step][2] = tiles[i][step].z, a[step][3] = tiles[i][step].w;
    }
    scale[0][0] = scale[0][1] = 1.0f;
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

// The 16 bytes of one row of activations that are chunk `chunk` (of 8) of a tile, in shared memory: rows of a pair lie
// in different halves of the banks, so that 8 lanes that read 4 chunks of two rows touch every bank once.
DEVICE int swizzled(int row, int chunk) { return (chunk ^ ((row & 1) << 2)) * 16; }

// Grid: row tiles / 2. Shared memory: kReductionBytes; with NORM also kNormBytes and tokens * tiles * 128.
template <class Stream, bool NORM> DEVICE void linear_narrow(const Linear& l) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int range = warp % kSplits, row_tile = blockIdx.x * kNarrowRowTiles + warp / kSplits;
  const int begin = range_start(l, range), end = min(range_start(l, range + 1), tiles_of(l));
  Stream stream;
  stream.start(l, row_tile, begin, end);  // before anything of the step before is read

  const int row_bytes = tiles_of(l) * kTileK * 2;
  u8* const normed = shared_memory() + kReductionBytes + kNormBytes;
  if constexpr (NORM) {
    float* const partials = (float*)(shared_memory() + kReductionBytes);
    for (int token = 0; token < l.tokens; token++) {
      const float partial = norm_partial(l.residual + (i64)token * l.k, l.k);
      if (lane == 0) partials[token * kNormWarps + warp] = partial;
    }
    __syncthreads();
    for (int token = 0; token < l.tokens; token++) {
      const float scale = norm_scale(partials + token * kNormWarps, l.k, l.eps);
      for (int i = 4 * threadIdx.x; i < row_bytes / 2; i += 4 * kThreads) {
        uint2 y = make_uint2(0, 0);
        if (i < l.k)
          y = normalized(*(const float4*)(l.residual + (i64)token * l.k + i), scale, *(const uint2*)(l.norm_weight + i));
        *(uint2*)(normed + token * row_bytes + i / kTileK * 128 + swizzled(token, i % kTileK / 8) + i % 8 * 2) = y;
      }
    }
    __syncthreads();
  }

  // Lanes beyond the last token repeat it: their columns are not written.
  const int token = min(g, l.tokens - 1);
  const u8* x = NORM ? normed + token * row_bytes : (const u8*)(l.x + (i64)token * l.k + 8 * t);
  x += begin * 128;
  const auto activations = [&](uint4(&b)[2], int base, int i) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const bool valid = NORM ? base + i < end : (base + i) * kTileK + 32 * j < l.k;
      b[j] = valid ? *(const uint4*)(x + i * 128 + (NORM ? swizzled(token, 4 * j + t) : 64 * j)) : no_words();
    }
  };

  float acc[4] = {0, 0, 0, 0};
  uint4 b[2], next_b[2];
  activations(next_b, begin, 0);
  for (int base = begin; base < end; base += Stream::kRing, x += Stream::kRing * 128) {
    stream.turn();
#pragma unroll
    for (int i = 0; i < Stream::kRing; i++) {
      u32 a[4][4];
      float scale[Stream::kParts][2];
      b[0] = next_b[0], b[1] = next_b[1];
      activations(next_b, base, i + 1);
      stream.operands(i, a, scale);
      stream.replace(i);
      multiply(acc, a, scale, b);
    }
  }

  float4* const sums = (float4*)shared_memory();
  sums[threadIdx.x] = make_float4(acc[0], acc[1], acc[2], acc[3]);
  __syncthreads();
  if (range != 0 || row_tile >= row_tiles_of(l)) return;
#pragma unroll
  for (int other = 1; other < kSplits; other++) add_to(acc, sums[threadIdx.x + other * 32]);
  write_out(l, acc, row_tile, 0);
}

// Grid: tokens / (8 * TOKEN_TILES), row tiles / (8 * ROW_TILES), 1 or kSplits. Shared memory: STAGES panels of PANEL
// tiles, TOKEN_TILES * 8 * PANEL * 128 bytes each, and ROW_TILES * TOKEN_TILES * 16 bytes of each thread.
template <class Stream, int TOKEN_TILES, int ROW_TILES, int PANEL, int STAGES> DEVICE void linear_wide(const Linear& l) {
  static_assert(Stream::kRing % PANEL == 0, "");
  constexpr int kTokens = 8 * TOKEN_TILES, kPanelBytes = kTokens * PANEL * 128;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_token = blockIdx.x * kTokens, first_row_tile = (blockIdx.y * kWarps + warp) * ROW_TILES;
  const bool alone = gridDim.z == 1;
  const int first_range = alone ? 0 : blockIdx.z, last_range = alone ? kSplits : first_range + 1;
  const int begin = range_start(l, first_range), end = min(range_start(l, last_range), tiles_of(l));
  Stream streams[ROW_TILES];
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) streams[r].start(l, first_row_tile + r, begin, end);

  u8* const panels = shared_memory();
  // Thread i copies chunk i % (8 * PANEL) of rows i / (8 * PANEL), and every so many after it; zeros beyond the last
  // token and beyond k.
  constexpr int kRowChunks = PANEL * 8, kRowStep = kThreads / kRowChunks;
  const int copy_row = threadIdx.x / kRowChunks, copy_chunk = threadIdx.x % kRowChunks;
  const half_t* const copy_from = l.x + (i64)(first_token + copy_row) * l.k + copy_chunk * 8;
  u8* const copy_to = panels + copy_row * PANEL * 128 + copy_chunk / 8 * 128 + swizzled(copy_row, copy_chunk % 8);
  const auto copy_panel = [&](int stage, int tile) {
    const bool inside = tile * kTileK + copy_chunk * 8 < l.k;
#pragma unroll
    for (int row = 0; row < kTokens; row += kRowStep)
      if (kRowStep <= kTokens || copy_row < kTokens)
        copy_async(copy_to + stage * kPanelBytes + row * PANEL * 128, copy_from + (i64)row * l.k + tile * kTileK,
                   inside && first_token + copy_row + row < l.tokens);
    copy_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) copy_panel(stage, begin + stage * PANEL);

  // Sums of the ranges before: each thread's own, in shared memory because registers are short.
  float4* const totals = (float4*)(panels + STAGES * kPanelBytes) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < ROW_TILES * TOKEN_TILES; i++) totals[i * kThreads] = make_float4(0, 0, 0, 0);

  float acc[ROW_TILES][TOKEN_TILES][4] = {};
  int stage = 0, range = first_range, range_end = begin;
  for (int base = begin; base < end; base += Stream::kRing) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) streams[r].turn();
    const u8* panel = nullptr;
#pragma unroll
    for (int i = 0; i < Stream::kRing; i++) {
      if (i % PANEL == 0) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // this panel is there, and nobody reads the one before it any more
        copy_panel(stage == 0 ? STAGES - 1 : stage - 1, base + i + (STAGES - 1) * PANEL);
        panel = panels + stage * kPanelBytes;
        stage = stage == STAGES - 1 ? 0 : stage + 1;
      }
      u32 a[ROW_TILES][4][4];
      float scale[ROW_TILES][Stream::kParts][2];
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++) {
        streams[r].operands(i, a[r], scale[r]);
        streams[r].replace(i);
      }
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; n++) {
        const u8* const row = panel + (8 * n + g) * PANEL * 128 + i % PANEL * 128;
        const uint4 b[2] = {*(const uint4*)(row + swizzled(g, t)), *(const uint4*)(row + swizzled(g, 4 + t))};
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) multiply(acc[r][n], a[r], scale[r], b);
      }
    }
    while (range_end <= base) range_end = range_start(l, ++range);
    if (base + Stream::kRing >= min(range_end, end)) {
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

  constexpr int kSums = ROW_TILES * TOKEN_TILES;
  if (!alone) {
    const int block = blockIdx.y * gridDim.x + blockIdx.x;
    float4* const partials = l.partials + (i64)block * kSplits * kSums * kThreads + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kSums; i++) partials[(blockIdx.z * kSums + i) * kThreads] = totals[i * kThreads];
    __syncthreads();
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
