// Attention over a paged cache of fp16 keys and values, for a step's mix of decodes, drafts and prompt chunks.
//
// A token's result does not depend on the rest of the step, to the bit, because the absolute positions of its keys fix
// the order of its sums, and every rounding:
//   a unit is 32 keys (a multiple of 32 and the 31 after it): scores on tensor cores, softmax against the unit's own
//   largest score, weights rounded to fp16, their product with the values summed from zero;
//   a split is 4 units (128 keys), folded in order; a token's splits are folded in order. Folding (m, l, a), the
//   largest score, the sum of weights and the weighted values, keeps the larger m. A unit or a split that a token
//   cannot see adds exactly nothing: its weights are 0 and what came before is scaled by 2^0.
// Which block or warp computes which part is then free:
//   few rows (a request with at most 16 tokens in this step): a tile is 16 rows (token, head of the group) of one
//   request; the list of (tile, KV head, split) items is cut into as many equal ranges as there are resident blocks. A
//   block's four warps take one unit each, and fetch the next item's keys as soon as they have read this one's. A
//   (tile, head) within one range is folded in registers and written out; for one that is cut, the block with its first
//   split leaves what it folded in scratch, the others leave each split, and the last block to arrive folds them all.
//   Given q|k|v as projected, these blocks rotate queries and keys themselves and take this step's own keys and values
//   from q|k|v (every tile of the request does, so that none waits for another); a token's own tile writes them.
//   many rows (prompts): a block takes 64 rows of one KV head, 16 a warp, through all their keys, two units at a time.
//
// Keys that the tile may not see are zeros in shared memory, and their blocks are not read: masked weights are 0, but 0
// times whatever an unused block holds could be NaN.
//
// Few rows, D = 128: a KV head's position is 512 bytes, read once, by 16-byte asynchronous copies of whole 256-byte
// rows. 64 KiB a block are in flight at the start and at least 32 KiB always, one block per multiprocessor on an A40,
// two on an H100: 2.7 MB and 8.6 MB, where 0.4 and 2.4 MB saturate memory. 128 keys are 64 products of 16 x 8 x 16 and
// about 1,000 other instructions per warp: 1.2 us on GA102, while the memory of an A40 needs 7.9 us for each
// multiprocessor's 64 KiB (H100: 2.9 us, and two blocks to hide it). So a layer's decode at 4,096 positions should take
// its 16.8 MB / bandwidth (24 us on an A40) plus 3 to 4 us for start, first latency and last fold; at 128 positions
// only the latter, 8 blocks fetching 64 KiB each, once.
//
// Many rows: 64 products and about 450 other instructions per unit and warp, 1,024 cycles of tensor cores on GA102: 60
// to 70% of their peak, with one warp per scheduler. Attention is 4% of the work of a prompt of 2,048 tokens.
#include "rotary.h"

constexpr int kThreads = 128;
constexpr int kUnit = 32;          // keys
constexpr int kSplit = 4 * kUnit;  // a unit for each warp
constexpr int kStage = 2 * kUnit;  // keys that a prompt's block fetches at once
constexpr int kFewRows = 16;       // in a tile
constexpr int kManyRows = 64;
constexpr int kFewTokens = 16;  // a request with more tokens in a step is a prompt

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

struct Step {
  const half_t* q;       // [tokens][heads][dim], rotated; or [tokens][heads + 2 kv_heads][dim]: q|k|v as projected,
  const float* rotary;   // to rotate by this [positions][dim], with k and v to be written. Null: that is already done
  half_t* keys;          // [blocks][kv_heads][block_size][dim]
  half_t* values;
  half_t* out;           // [tokens][heads][dim]
  const int* tables;     // [requests][table_width]
  int table_width, heads, kv_heads, dim, block_size, window;
  float scale;           // log2(e) / sqrt(dim): weights are powers of two

  __device__ __forceinline__ int group() const { return heads / kv_heads; }
  __device__ __forceinline__ i64 token_stride() const { return (i64)(rotary ? heads + 2 * kv_heads : heads) * dim; }
};

// Consecutive tokens of one request, with the heads of a KV head's group: row r is token r / group, head r % group.
struct alignas(16) Tile {
  int token, tokens, position, request;        // the first one's index in the step, how many, the first one's position
  int first_split, splits, first_item, fresh;  // what they see; where their items begin (few rows only); the position
                                               // of the request's first token in this step

  __device__ __forceinline__ int end() const { return position + tokens; }
  __device__ __forceinline__ int first_seen(int window) const { return max(0, position - window + 1); }
};

// -- a unit -------------------------------------------------------------------------------------------------------

template <int D> constexpr int kUnitBytes = kUnit * D * 2;

// Byte offset of 8 dimensions of a key in a unit; exclusive or, so that the 8 rows of a matrix lie in different banks.
template <int D> DEVICE int place(int key, int piece) { return (key * (D / 8) + (piece ^ (key & 7))) * 16; }

// Where a position's key and value lie in the cache, in 16-byte pieces; -1 if the tile may not see it.
DEVICE int cache_row(const Step& step, const Tile& tile, int head, int position) {
  if (position < tile.first_seen(step.window) || position >= tile.end()) return -1;
  const int block = step.tables[(i64)tile.request * step.table_width + position / step.block_size];
  const int row = (block * step.kv_heads + head) * step.block_size + position % step.block_size;
  return block < 0 ? -1 : row * (step.dim / 8);
}

// A warp copies a unit's keys or values, up to key `fresh`; `row` is the cache_row of the lane's own key.
template <int D> DEVICE void copy_unit(u8* to, const half_t* cache, int row, int dim, int fresh = kUnit) {
  constexpr int kPieces = D / 8, kRows = 32 / kPieces;
  const int lane = threadIdx.x % 32, piece = lane % kPieces;
#pragma unroll 4  // fully unrolled, the addresses would take more registers than there are
  for (int first = 0; first < kUnit; first += kRows) {
    const int key = first + lane / kPieces;
    const int at = __shfl_sync(0xffffffffu, row, key);
    const bool valid = at >= 0 && 8 * piece < dim;
    if (at < 0 || key < fresh)
      copy_async(to + place<D>(key, piece), cache + (valid ? (i64)(at + piece) * 8 : 0), valid);
  }
}

// The first key of a unit that is this step's own, if attention takes those from q|k|v itself.
DEVICE int fresh_key(const Step& step, const Tile& tile, int position) {
  return step.rotary ? max(0, tile.fresh - position) : kUnit;
}

// Copies the keys (rotated) or values from there on to shared memory, and those of the tile's own tokens to the cache.
template <int D, bool kKeys>
DEVICE void copy_fresh(u8* to, int row, const Step& step, const Tile& tile, int head, int position) {
  constexpr int kPieces = D / 8, kRows = 32 / kPieces;
  const int lane = threadIdx.x % 32, piece = lane % kPieces;
  const int end = min(kUnit, tile.end() - position);
  half_t* cache = kKeys ? step.keys : step.values;
  for (int first = fresh_key(step, tile, position); first < end; first += kRows) {
    const int key = first + lane / kPieces;
    const int at = __shfl_sync(0xffffffffu, row, min(key, end - 1));
    if (key >= end || at < 0) continue;
    const int ahead = position + key - tile.position;  // of the tile's first token; behind it if below 0
    const int from_head = step.heads + head + (kKeys ? 0 : step.kv_heads);
    const half_t* from = step.q + (tile.token + ahead) * step.token_stride() + from_head * D;
    uint4 x = *(const uint4*)(from + 8 * piece);
    if (kKeys) {
      const float* cos = step.rotary + (i64)(position + key) * D + piece % (kPieces / 2) * 8;
      x = turn(x, *(const uint4*)(from + 8 * (piece ^ kPieces / 2)), cos, cos + D / 2, piece >= kPieces / 2);
    }
    *(uint4*)(to + place<D>(key, piece)) = x;
    if (ahead >= 0) *(uint4*)(cache + (i64)(at + piece) * 8) = x;
  }
}

// For each of a thread's two rows, lane / 4 and lane / 4 + 8: the positions from `first` to `last` that it sees.
struct Rows {
  int first[2], last[2];
};

// Queries of 16 rows as fragments. Rows beyond the tile's tokens are zeros and see nothing.
template <int D>
DEVICE Rows load_queries(u32 (&q)[D / 16][4], const Step& step, const Tile& tile, int head, int first_row) {
  const int lane = threadIdx.x % 32, group = step.group();
  Rows rows;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first_row + 8 * half + lane / 4, token = row / group;
    const bool valid = token < tile.tokens;
    const i64 at = (tile.token + token) * step.token_stride() + (head * group + row % group) * step.dim;
    const u32* from = (const u32*)(step.q + (valid ? at : 0));
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      q[j][half] = valid && 16 * j < step.dim ? from[8 * j + lane % 4] : 0;
      q[j][half + 2] = valid && 16 * j < step.dim ? from[8 * j + 4 + lane % 4] : 0;
    }
    rows.last[half] = valid ? tile.position + token : -1;
    rows.first[half] = max(0, rows.last[half] - step.window + 1);
    if (!step.rotary || !valid) continue;
    const float* cos = step.rotary + (i64)rows.last[half] * D + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
#pragma unroll
      for (int i = half; i < 4; i += 2) {
        const int at = 16 * j + i / 2 * 8;
        const float2 c = *(const float2*)(cos + at), s = *(const float2*)(cos + D / 2 + at);
        const u32 first = q[j][i], second = q[j + D / 32][i];
        q[j][i] = turn(first, second, c, s, false);
        q[j + D / 32][i] = turn(second, first, c, s, true);
      }
    }
  }
  return rows;
}

// Dot products of 16 queries and a unit's keys.
template <int D> DEVICE void multiply_keys(float (&scores)[4][4], const u32 (&q)[D / 16][4], const u8* keys) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < 4; n++) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0;
#pragma unroll
  for (int j = 0; j < D / 16; j++) {
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      u32 m[4];
      load_matrices(m, keys + place<D>(8 * n + lane / 16 * 8 + lane % 8, 2 * j + lane / 8 % 2));
      mma_16x8x16(scores[n], q[j], {m[0], m[1]});
      mma_16x8x16(scores[n + 1], q[j], {m[2], m[3]});
    }
  }
}

// Scores → weights as fragments, each row's largest score (times scale) and its sum of weights.
DEVICE void soften(float (&scores)[4][4], u32 (&weights)[2][4], float (&top)[2], float (&sum)[2], int position,
                   const Rows& rows, float scale) {
  const int column = position + threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float largest = minus_infinity();
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float& score = scores[i / 2][2 * half + i % 2];
      const int at = column + i / 2 * 8 + i % 2;
      if (at < rows.first[half] || at > rows.last[half]) score = minus_infinity();
      largest = fmaxf(largest, score);
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    top[half] = largest * scale;
    const float base = largest == minus_infinity() ? 0.0f : top[half];
    sum[half] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float& score = scores[i / 2][2 * half + i % 2];
      score = fast_exp2(fmaf(score, scale, -base));
      sum[half] += score;
    }
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
  }
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      weights[j][i] = pack_halves(scores[2 * j + i / 2][i % 2 * 2], scores[2 * j + i / 2][i % 2 * 2 + 1]);
}

// Weights times a unit's values: calls use(n, product) for the dimensions 8n to 8n + 7.
template <int D, class Use> DEVICE void multiply_values(const u32 (&weights)[2][4], const u8* values, Use use) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < D / 8; n += 2) {
    float products[2][4] = {};
#pragma unroll
    for (int j = 0; j < 2; j++) {
      u32 m[4];
      load_matrices_transposed(m, values + place<D>(16 * j + lane % 16, n + lane / 16));
      mma_16x8x16(products[0], weights[j], {m[0], m[1]});
      mma_16x8x16(products[1], weights[j], {m[2], m[3]});
    }
    use(n, products[0]);
    use(n + 1, products[1]);
  }
}

// What a row's sums so far, and the values that join them, are multiplied by.
struct Scales {
  float old, fresh;
};

// Products and sums are rounded as written here, everywhere, whatever the compiler might want to contract.
DEVICE float join(float old, float fresh, Scales scales) { return fmaf(old, scales.old, fresh * scales.fresh); }

DEVICE Scales fold(float& top, float& sum, float fresh_top, float fresh_sum) {
  const float larger = fmaxf(top, fresh_top), base = larger == minus_infinity() ? 0.0f : larger;
  const Scales scales = {fast_exp2(top - base), fast_exp2(fresh_top - base)};
  top = larger;
  sum = join(sum, fresh_sum, scales);
  return scales;
}

// Shared memory: keys and values of four units each, then either a prompt's sums or, for few rows, each warp's weighted
// values [16][D + 8] float32 (8 more, so that a fragment's rows lie in different banks), its largest scores and sums
// [16][2], and a word.
template <int D> constexpr int kPartStride = D + 8;
template <int D> constexpr int kPartsAt = 8 * kUnitBytes<D>;
template <int D> constexpr int kStatsAt = kPartsAt<D> + 4 * kFewRows * kPartStride<D> * 4;
template <int D> constexpr int kWordAt = kStatsAt<D> + 4 * kFewRows * 2 * 4;

// -- many rows ----------------------------------------------------------------------------------------------------

template <int D> DEVICE void attend_many(const Step& step, const Tile& tile, int head) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = step.group();
  const int first_row = 16 * warp, dim = step.dim;
  u8* shared = shared_memory();
  // A stage holds the keys of two units, then their values; each warp copies one of the four.
  const auto fetch = [&](int stage) {
    const int row = cache_row(step, tile, head, stage * kStage + warp % 2 * kUnit + lane);
    copy_unit<D>(shared + (stage % 2 * 4 + warp) * kUnitBytes<D>, warp < 2 ? step.keys : step.values, row, dim);
    copy_async_commit();
  };
  const int first_stage = tile.first_seen(step.window) / kStage, last_stage = (tile.end() - 1) / kStage;
  fetch(first_stage);

  u32 q[D / 16][4];
  const Rows rows = load_queries<D>(q, step, tile, head, first_row);
  const int first_token = first_row / group, last_token = min((first_row + 15) / group, tile.tokens - 1);
  const bool idle = first_token > last_token;
  const int last_seen = tile.position + last_token;
  const int first_seen = max(0, tile.position + first_token - step.window + 1);

  // Sums of this split, then of the previous splits, whose values would take 64 more registers and so are at
  // all[kThreads * n] in shared memory.
  float top[2], sum[2], a[D / 8][4];
  float all_top[2] = {minus_infinity(), minus_infinity()}, all_sum[2] = {};
  float4* all = (float4*)(shared + kPartsAt<D>) + threadIdx.x;
#pragma unroll
  for (int n = 0; n < D / 8; n++) all[kThreads * n] = make_float4(0, 0, 0, 0);
  const auto clear = [&] {
    top[0] = top[1] = minus_infinity();
    sum[0] = sum[1] = 0;
#pragma unroll
    for (int n = 0; n < D / 8; n++) a[n][0] = a[n][1] = a[n][2] = a[n][3] = 0;
  };
  clear();

  for (int stage = first_stage; stage <= last_stage; stage++) {
    if (stage < last_stage) {
      fetch(stage + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    for (int unit = 0; unit < 2; unit++) {
      const int position = stage * kStage + unit * kUnit;
      if (idle || position > last_seen || position + kUnit <= first_seen) continue;
      const u8* keys = shared + (stage % 2 * 4 + unit) * kUnitBytes<D>;
      float scores[4][4], unit_top[2], unit_sum[2];
      u32 weights[2][4];
      multiply_keys<D>(scores, q, keys);
      soften(scores, weights, unit_top, unit_sum, position, rows, step.scale);
      const Scales low = fold(top[0], sum[0], unit_top[0], unit_sum[0]);
      const Scales high = fold(top[1], sum[1], unit_top[1], unit_sum[1]);
      multiply_values<D>(weights, keys + 2 * kUnitBytes<D>, [&](int n, const float(&product)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[n][i] = join(a[n][i], product[i], i < 2 ? low : high);
      });
    }
    if ((stage + 1) * kStage % kSplit == 0 || stage == last_stage) {
      const Scales low = fold(all_top[0], all_sum[0], top[0], sum[0]);
      const Scales high = fold(all_top[1], all_sum[1], top[1], sum[1]);
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        const float4 old = all[kThreads * n];
        all[kThreads * n] = make_float4(join(old.x, a[n][0], low), join(old.y, a[n][1], low),
                                        join(old.z, a[n][2], high), join(old.w, a[n][3], high));
      }
      clear();
    }
    __syncthreads();
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first_row + 8 * half + lane / 4, token = row / group;
    if (token >= tile.tokens) continue;
    const float inverse = 1.0f / all_sum[half];
    u32* out = (u32*)(step.out + ((i64)(tile.token + token) * step.heads + head * group + row % group) * dim);
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      const float2 x = ((const float2*)(all + kThreads * n))[half];
      if (8 * n < dim) out[4 * n + lane % 4] = pack_halves(x.x * inverse, x.y * inverse);
    }
  }
}

// -- few rows -----------------------------------------------------------------------------------------------------

// The items are cut into ranges of `each` items; the first `longer` ranges have one more.
struct Cut {
  int each, longer;

  __device__ __forceinline__ int start(int range) const { return range * each + min(range, longer); }
  __device__ __forceinline__ int of(int item) const {
    const int before = longer * (each + 1);
    return item < before ? item / (each + 1) : longer + (item - before) / each;
  }
};

// A block's range of items, with all that it needs to begin. begin == end: there are too few items for this block.
struct alignas(16) Range {
  Tile tile;
  int index, head, split;  // of the first item
  int begin, end;
  Cut cut;
  int none;
};

// One item of the list, in which splits vary fastest, then heads, then tiles.
struct Item {
  Tile tile;
  int index, head, split;  // the tile's in its list; KV head; which of the tile's splits

  __device__ __forceinline__ bool last_split() const { return split == tile.splits - 1; }
  __device__ __forceinline__ int position() const { return (tile.first_split + split) * kSplit; }
};

DEVICE Item following(Item item, const Tile* tiles, int kv_heads) {
  if (++item.split < item.tile.splits) return item;
  item.split = 0;
  if (++item.head < kv_heads) return item;
  item.head = 0;
  item.tile = tiles[++item.index];
  return item;
}

// A thread's share of a tile: four dimensions of every kStep-th row.
template <int D> struct Share {
  static constexpr int kColumns = D / 4, kStep = kThreads / kColumns, kCount = kFewRows / kStep;
  float top[kCount], sum[kCount], a[kCount][4];

  static __device__ __forceinline__ int row(int k) { return threadIdx.x / kColumns + k * kStep; }
  static __device__ __forceinline__ int column() { return threadIdx.x % kColumns * 4; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      top[k] = minus_infinity();
      sum[k] = a[k][0] = a[k][1] = a[k][2] = a[k][3] = 0;
    }
  }
  __device__ __forceinline__ void add(int k, float fresh_top, float fresh_sum, float4 fresh) {
    const Scales scales = fold(top[k], sum[k], fresh_top, fresh_sum);
    a[k][0] = join(a[k][0], fresh.x, scales);
    a[k][1] = join(a[k][1], fresh.y, scales);
    a[k][2] = join(a[k][2], fresh.z, scales);
    a[k][3] = join(a[k][3], fresh.w, scales);
  }
};

// Scratch: for each range `slots` slots of [16][D] weighted values and [16][2] largest scores and sums. Slot 0 holds
// what was folded from a first split on; slot 1 + i holds the i-th item of the range alone.
template <int D> constexpr int kSlot = kFewRows * (D + 2);

template <int D> DEVICE void leave(float* slot, int rows, int k, float top, float sum, float4 a) {
  const int row = Share<D>::row(k), column = Share<D>::column();
  if (row >= rows) return;
  *(float4*)(slot + row * D + column) = a;
  if (column == 0) *(float2*)(slot + kFewRows * D + 2 * row) = make_float2(top, sum);
}

// Folds what the blocks of a (tile, head) left, in the order of splits; its items are those from `first` to `end`.
template <int D>
DEVICE void fold_left(Share<D>& share, const float* scratch, int slots, Cut cut, int first, int end, int rows) {
  constexpr int kAtOnce = 8;  // loads in flight
  share.clear();
#pragma unroll
  for (int k = 0; k < Share<D>::kCount; k++) {
    const int row = Share<D>::row(k);
    if (row >= rows) continue;
    int range = cut.of(first), begin = 0, next = cut.start(range + 1), item = next;
    i64 slot = (i64)range * slots;  // what the first block folded; then item by item
    for (bool more = true; more;) {
      float2 stats[kAtOnce];
      float4 a[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        stats[i] = make_float2(minus_infinity(), 0);
        a[i] = make_float4(0, 0, 0, 0);
        if (!more) continue;
        stats[i] = *(const float2*)(scratch + slot * kSlot<D> + kFewRows * D + 2 * row);
        a[i] = *(const float4*)(scratch + slot * kSlot<D> + row * D + Share<D>::column());
        more = item < end;
        if (item == next) {
          begin = next;
          next += cut.each + (++range < cut.longer);
        }
        slot = (i64)range * slots + 1 + item++ - begin;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) share.add(k, stats[i].x, stats[i].y, a[i]);
    }
  }
}

template <int D> DEVICE void write_out(const Step& step, const Tile& tile, int head, const Share<D>& share) {
  const int group = step.group(), column = Share<D>::column();
#pragma unroll
  for (int k = 0; k < Share<D>::kCount; k++) {
    const int row = Share<D>::row(k), token = row / group;
    if (token >= tile.tokens || column >= step.dim) continue;
    const i64 at = ((i64)(tile.token + token) * step.heads + head * group + row % group) * step.dim + column;
    const float inverse = 1.0f / share.sum[k];
    *(uint2*)(step.out + at) = make_uint2(pack_halves(share.a[k][0] * inverse, share.a[k][1] * inverse),
                                          pack_halves(share.a[k][2] * inverse, share.a[k][3] * inverse));
  }
}

template <int D>
DEVICE void attend_few(const Step& step, const Tile* tiles, const Range* ranges, u32* counters, float* scratch,
                       int slots) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  u8* keys = shared_memory() + 2 * warp * kUnitBytes<D>;
  u8* values = keys + kUnitBytes<D>;
  float* parts = (float*)(shared_memory() + kPartsAt<D>);
  float* stats = (float*)(shared_memory() + kStatsAt<D>);
  int* word = (int*)(shared_memory() + kWordAt<D>);

  const Range range = ranges[blockIdx.x];
  if (range.begin == range.end) return;
  float* slot = scratch + (i64)blockIdx.x * slots * kSlot<D>;
  Item item = {range.tile, range.index, range.head, range.split};
  const auto place_of = [&](const Item& it) { return it.position() + warp * kUnit; };
  const auto row_of = [&](const Item& it) { return cache_row(step, it.tile, it.head, place_of(it) + lane); };
  int row = row_of(item);
  const auto fetch_keys = [&](const Item& it) {
    copy_unit<D>(keys, step.keys, row, step.dim, fresh_key(step, it.tile, place_of(it)));
  };
  const auto fetch_values = [&](const Item& it) {
    copy_unit<D>(values, step.values, row, step.dim, fresh_key(step, it.tile, place_of(it)));
  };
  const auto take_keys = [&](const Item& it) { copy_fresh<D, true>(keys, row, step, it.tile, it.head, place_of(it)); };
  const auto take_values = [&](const Item& it) {
    copy_fresh<D, false>(values, row, step, it.tile, it.head, place_of(it));
  };
  fetch_keys(item);
  copy_async_commit();
  fetch_values(item);
  copy_async_commit();
  take_keys(item);
  take_values(item);

  u32 q[D / 16][4];
  Rows rows;
  Share<D> share;
  bool from_first = false;  // share holds the (tile, head)'s splits from the first one on
  for (int at = range.begin; at < range.end; at++) {
    const bool more = at + 1 < range.end;
    const Item next = more ? following(item, tiles, step.kv_heads) : item;
    row = more ? row_of(next) : -1;
    const int used = item.tile.tokens * step.group();
    if (at == range.begin || item.split == 0) {
      rows = load_queries<D>(q, step, item.tile, item.head, 0);
      from_first = item.split == 0;
      share.clear();
    }

    // Groups of copies complete in order: this item's keys and values, the next one's keys and values.
    float scores[4][4], top[2], sum[2];
    u32 weights[2][4];
    copy_async_wait<1>();
    __syncwarp();
    multiply_keys<D>(scores, q, keys);
    __syncwarp();
    if (more) fetch_keys(next);
    copy_async_commit();
    if (more) take_keys(next);
    soften(scores, weights, top, sum, item.position() + warp * kUnit, rows, step.scale);
    copy_async_wait<1>();
    __syncthreads();  // and no warp reads the previous item's parts any more
    multiply_values<D>(weights, values, [&](int n, const float(&product)[4]) {
      float* part = parts + (warp * kFewRows + g) * kPartStride<D> + 8 * n + 2 * t;
      if (g < used) *(float2*)part = make_float2(product[0], product[1]);
      if (g + 8 < used) *(float2*)(part + 8 * kPartStride<D>) = make_float2(product[2], product[3]);
    });
    if (t == 0) {
      *(float2*)(stats + 2 * (warp * kFewRows + g)) = make_float2(top[0], sum[0]);
      *(float2*)(stats + 2 * (warp * kFewRows + g + 8)) = make_float2(top[1], sum[1]);
    }
    __syncthreads();
    if (more) fetch_values(next);
    copy_async_commit();
    if (more) take_values(next);

#pragma unroll
    for (int k = 0; k < Share<D>::kCount; k++) {
      const int r = Share<D>::row(k);
      if (r >= used) continue;
      float split_top = minus_infinity(), split_sum = 0;
      float4 a = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const float2 unit = *(const float2*)(stats + 2 * (w * kFewRows + r));
        const float4 part = *(const float4*)(parts + (w * kFewRows + r) * kPartStride<D> + Share<D>::column());
        const Scales scales = fold(split_top, split_sum, unit.x, unit.y);
        a = make_float4(join(a.x, part.x, scales), join(a.y, part.y, scales), join(a.z, part.z, scales),
                        join(a.w, part.w, scales));
      }
      if (from_first) share.add(k, split_top, split_sum, a);
      else leave<D>(slot + (i64)(1 + at - range.begin) * kSlot<D>, used, k, split_top, split_sum, a);
    }

    if (item.last_split() || !more) {
      bool whole = from_first && item.last_split();
      if (!whole) {
        if (from_first) {
#pragma unroll
          for (int k = 0; k < Share<D>::kCount; k++)
            leave<D>(slot, used, k, share.top[k], share.sum[k],
                     make_float4(share.a[k][0], share.a[k][1], share.a[k][2], share.a[k][3]));
        }
        const int first = item.tile.first_item + item.head * item.tile.splits, past = first + item.tile.splits;
        const u32 blocks = range.cut.of(past - 1) - range.cut.of(first) + 1;
        whole = last_to_arrive(counters + item.index * step.kv_heads + item.head, blocks, word);
        if (whole) fold_left<D>(share, scratch, slots, range.cut, first, past, used);
      }
      if (whole) write_out<D>(step, item.tile, item.head, share);
    }
    item = next;
  }
}

// Blocks take prompt tiles in turn, if the step can have any, then their own range of items.
template <int D>
DEVICE void attend(const Step& step, const int* counts, const Tile* tiles, const Tile* prompt_tiles,
                   const Range* ranges, int max_ranges, u32* counters, float* scratch, int slots) {
  wait_for_previous_kernel();
  if (prompt_tiles) {
    const int items = counts[1] * step.kv_heads;
    for (int i = blockIdx.x; i < items; i += gridDim.x)
      attend_many<D>(step, prompt_tiles[i / step.kv_heads], i % step.kv_heads);
  }
  if ((int)blockIdx.x < max_ranges) attend_few<D>(step, tiles, ranges, counters, scratch, slots);
}

#define PARAMETERS                                                                                                  \
  const half_t *q, const float *rotary, half_t *keys, half_t *values, half_t *out, const int *tables,               \
      int table_width, int heads, int kv_heads, int dim, int block_size, int window, float scale, const int *counts, \
      const int *tiles, const int *prompt_tiles, const int *ranges, int max_ranges, u32 *counters, float *scratch,  \
      int slots
#define STEP {q, rotary, keys, values, out, tables, table_width, heads, kv_heads, dim, block_size, window, scale}
#define LISTS                                                                                                    \
  counts, (const Tile*)tiles, (const Tile*)prompt_tiles, (const Range*)ranges, max_ranges, counters, scratch, slots

KERNEL(kThreads) attention_64(PARAMETERS) { attend<64>(STEP, LISTS); }    // heads of up to 64 dimensions
KERNEL(kThreads) attention_128(PARAMETERS) { attend<128>(STEP, LISTS); }  // and up to 128

// -- a step's plan ------------------------------------------------------------------------------------------------

// One block makes the lists that all layers' attention reads: tiles of few rows and of prompts, how few-row items are
// cut, and `counts`, the numbers of few-row items and of prompt tiles. It zeroes `counters` of each (tile, KV head).
KERNEL(256) plan_attention(const int* query_starts, const int* context_lens, int requests, int group, int kv_heads,
                           int window, int max_ranges, int* counts, int* tiles_at, int* prompt_tiles_at, int* ranges_at,
                           u32* counters) {
  wait_for_previous_kernel();
  Tile* tiles = (Tile*)tiles_at;
  Tile* prompt_tiles = (Tile*)prompt_tiles_at;
  int* totals = (int*)shared_memory();  // [3][256]: tiles, items, prompt tiles of the requests up to this thread's
  const int thread = threadIdx.x, few = kFewRows / group, many = kManyRows / group;
  int before[3] = {};
  for (int base = 0; base < requests; base += blockDim.x) {
    const int request = base + thread;
    int tokens = 0, context = 0, first_token = 0;
    if (request < requests) {
      first_token = query_starts[request];
      context = context_lens[request];
      tokens = context > 0 ? query_starts[request + 1] - first_token : 0;
    }
    const bool prompt = tokens > kFewTokens;
    const int each = prompt ? many : few, count = (tokens + each - 1) / each;
    const auto tile_of = [&](int i) {
      Tile tile;
      tile.token = first_token + i * each;
      tile.tokens = min(each, tokens - i * each);
      tile.position = context - tokens + i * each;
      tile.request = request;
      tile.first_split = tile.first_seen(window) / kSplit;
      tile.splits = (tile.end() - 1) / kSplit + 1 - tile.first_split;
      tile.first_item = 0;
      tile.fresh = context - tokens;
      return tile;
    };
    int own[3] = {prompt ? 0 : count, 0, prompt ? count : 0};
    if (!prompt)
      for (int i = 0; i < count; i++) own[1] += tile_of(i).splits * kv_heads;

    for (int j = 0; j < 3; j++) totals[j * 256 + thread] = own[j];
    __syncthreads();
    for (int back = 1; back < 256; back *= 2) {
      int sum[3];
      for (int j = 0; j < 3; j++) {
        const int* total = totals + j * 256 + thread;
        sum[j] = *total + (thread >= back ? total[-back] : 0);
      }
      __syncthreads();
      for (int j = 0; j < 3; j++) totals[j * 256 + thread] = sum[j];
      __syncthreads();
    }
    int at[3];  // where this request's own begin
    for (int j = 0; j < 3; j++) at[j] = before[j] + totals[j * 256 + thread] - own[j];
    for (int j = 0; j < 3; j++) before[j] += totals[j * 256 + 255];
    __syncthreads();

    for (int i = 0; i < count; i++) {
      Tile tile = tile_of(i);
      if (prompt) {
        prompt_tiles[at[2] + count - 1 - i] = tile;  // the longest first
      } else {
        tile.first_item = at[1];
        at[1] += tile.splits * kv_heads;
        tiles[at[0] + i] = tile;
      }
    }
  }
  if (thread == 0) {
    counts[0] = before[1];
    counts[1] = before[2];
  }
  __syncthreads();

  const int count = before[0], items = before[1], used = min(items, max_ranges);
  for (int i = thread; i < count * kv_heads; i += blockDim.x) counters[i] = 0;
  for (int i = thread; i < max_ranges; i += blockDim.x) {
    Range range = {};
    if (i < used) {
      range.cut = {items / used, items % used};
      range.begin = range.cut.start(i);
      range.end = range.cut.start(i + 1);
      int low = 0, high = count - 1;  // the last tile that begins at or before the range
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (tiles[middle].first_item <= range.begin) low = middle;
        else high = middle - 1;
      }
      range.index = low;
      range.tile = tiles[low];
      range.head = (range.begin - range.tile.first_item) / range.tile.splits;
      range.split = (range.begin - range.tile.first_item) % range.tile.splits;
    }
    ((Range*)ranges_at)[i] = range;
  }
}
