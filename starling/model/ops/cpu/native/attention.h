// Attention over the paged cache, for rows that share a key/value head: a token's query heads, or several tokens'.
//
// Positions are cut into splits of 256, at absolute multiples. A row's split is always computed in the same order
// (scores; their maximum; e^(score - maximum), summed in 16 lanes; values in ascending position), and its splits are
// merged in ascending order. So decode and prefill, one thread or many, alone or in a batch do the same operations on
// the same numbers. A score's products are summed in kLanes chains, each of dimensions d, d + kLanes, ..., and the
// chains are added in the order of v_sum_rows.
//
// Few rows read keys and values straight from the cache. Many rows, a prompt's, share them: kSpan positions at a time
// are converted to floats in L1, keys transposed to one position per lane, so that no row converts them again or adds
// across lanes.
#pragma once

namespace {

constexpr int kRowTile = 4;
constexpr int kPositionTile = kLanes / kRowTile;  // kRowTile * kPositionTile dot products fill one register
constexpr int kSpan = kKeys * kLanes;  // positions that many_rows takes at a time
constexpr int kManyRows = 5 * kRowTile;  // from here on transposing the keys pays off

struct Rows {  // up to 4 query rows
  int count;
  const float* q[kRowTile];      // scaled by 1 / sqrt(dim), padded to a multiple of 16
  int64_t low[kRowTile], high[kRowTile];  // visible positions [low, high)
};

// Prefetches `dim` numbers of a key or value.
template <class T> STARLING_INLINE void prefetch_vector(const T* from, int64_t dim) {
  for (int64_t b = 0; b < dim * (int64_t)sizeof(T); b += 64)
    __builtin_prefetch((const char*)from + b, 0, kPrefetchToL2 ? 2 : 3);
}

// scores[r][p] for positions [0, count), count a multiple of 16. `keys` point to each position's key; `values` are read
// next, and prefetched here.
template <class T>
STARLING_INLINE void score(const Rows& rows, const T* const* keys, const T* const* values, int64_t count, int64_t dim,
                           float (*scores)[kKvSplit]) {
  for (int64_t p = 0; p < count; p += kPositionTile) {
    V acc[kRowTile * kPositionTile];
    for (int i = 0; i < kRowTile * kPositionTile; i++) acc[i] = v_zero();
    for (int i = 0; i < kPositionTile; i++) {
      const int64_t soon = p + i + kPrefetchPositions;
      prefetch_vector(soon < count ? keys[soon] : values[soon - count < count ? soon - count : 0], dim);
    }
    for (int64_t d = 0; d < dim; d += kLanes) {
      V k[kPositionTile];
#pragma GCC unroll 4
      for (int i = 0; i < kPositionTile; i++) k[i] = v_load(keys[p + i] + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRowTile; r++) {
        const V q = v_load(rows.q[r] + d);
#pragma GCC unroll 4
        for (int i = 0; i < kPositionTile; i++)
          acc[r * kPositionTile + i] = v_fma(q, k[i], acc[r * kPositionTile + i]);
      }
    }
    float sums[kLanes];
    v_store(sums, v_sum_rows(acc));
    for (int r = 0; r < kRowTile; r++) memcpy(&scores[r][p], sums + r * kPositionTile, kPositionTile * sizeof(float));
  }
}

// out[r][d] += the sum over positions of weights[r][p] * values[p][d], for Depth registers of d from `first` on.
template <int Depth, class T>
STARLING_INLINE void weigh(const T* const* values, int64_t first, int64_t count, const float (*weights)[kKvSplit],
                  float (*out)[kMaxHeadDim]) {
  V acc[kRowTile][Depth];
  for (int r = 0; r < kRowTile; r++)
    for (int i = 0; i < Depth; i++) acc[r][i] = v_load(out[r] + first + i * kLanes);
  for (int64_t p = 0; p < count; p++) {
    if (p + kPrefetchPositions < count) prefetch_vector(values[p + kPrefetchPositions] + first, Depth * kLanes);
    V v[Depth];
#pragma GCC unroll 4
    for (int i = 0; i < Depth; i++) v[i] = v_load(values[p] + first + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRowTile; r++) {
      const V w = v_set(weights[r][p]);
#pragma GCC unroll 4
      for (int i = 0; i < Depth; i++) acc[r][i] = v_fma(w, v[i], acc[r][i]);
    }
  }
  for (int r = 0; r < kRowTile; r++)
    for (int i = 0; i < Depth; i++) v_store(out[r] + first + i * kLanes, acc[r][i]);
}

template <class T>
STARLING_INLINE void weigh_all(const T* const* values, int64_t count, int64_t dim, const float (*weights)[kKvSplit],
                               float (*out)[kMaxHeadDim]) {
  int64_t d = 0;
  for (; d + kDepth * kLanes <= dim; d += kDepth * kLanes) weigh<kDepth>(values, d, count, weights, out);
  for (; d < dim; d += kLanes) weigh<1>(values, d, count, weights, out);
}

// Keys of kSpan positions as floats [dim][kSpan]. Rounds of interleaving the halves of a square transpose it.
template <class T> inline void transpose_keys(const T* const* keys, int64_t dim, float* transposed) {
  for (int p = 0; p < kSpan; p += kLanes)
    for (int64_t d = 0; d < dim; d += kLanes) {
      V lines[kLanes], zipped[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) lines[i] = v_load(keys[p + i] + d);
#pragma GCC unroll 4
      for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; i++) {
          zipped[2 * i] = lines[i];
          zipped[2 * i + 1] = lines[i + kLanes / 2];
          v_zip(zipped[2 * i], zipped[2 * i + 1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) lines[i] = zipped[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) v_store(transposed + (d + i) * kSpan + p, lines[i]);
    }
}

// scores[r][p] for kSpan positions, bit-identical to those of `score`; `keys` as transpose_keys made them.
STARLING_INLINE void score_transposed(const Rows& rows, const float* keys, int64_t dim, float (*scores)[kKvSplit]) {
  constexpr int kTop = __builtin_ctz(kLanes);
  V sums[kTop + 1][kRowTile * kKeys];  // sums[h]: of 2^h neighbouring chains, until the next 2^h are summed
  for (int lane = 0; lane < kLanes; lane++) {
    V acc[kRowTile * kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kRowTile * kKeys; i++) acc[i] = v_zero();
    for (int64_t d = lane; d < dim; d += kLanes) {
      V k[kKeys];
#pragma GCC unroll 4
      for (int i = 0; i < kKeys; i++) k[i] = v_load(keys + d * kSpan + i * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRowTile; r++) {
        const V q = v_set(rows.q[r][d]);
#pragma GCC unroll 4
        for (int i = 0; i < kKeys; i++) acc[r * kKeys + i] = v_fma(q, k[i], acc[r * kKeys + i]);
      }
    }
    int height = 0;
    for (; lane >> height & 1; height++)
#pragma GCC unroll 16
      for (int i = 0; i < kRowTile * kKeys; i++) acc[i] = v_add(sums[height][i], acc[i]);
#pragma GCC unroll 16
    for (int i = 0; i < kRowTile * kKeys; i++) sums[height][i] = acc[i];
  }
  for (int r = 0; r < kRowTile; r++)
    for (int i = 0; i < kKeys; i++) v_store(&scores[r][i * kLanes], sums[kTop][r * kKeys + i]);
}

struct State {  // a row's softmax so far: its largest score, and the sum of e^(score - largest)
  float largest, total;
};

inline float exp_one(float x) {
  float lanes[16];
  f_store(lanes, f_exp(f_set(x)));
  return lanes[0];
}

// Adds a later split to the sums so far (of e^(score - largest) * value). A total of 0: no position seen yet.
inline void merge_split(State& state, float* sums, const State& later, const float* later_sums, int64_t dim) {
  if (later.total == 0.0f) return;
  if (state.total == 0.0f) {
    state = later;
    memcpy(sums, later_sums, dim * sizeof(float));
    return;
  }
  const float largest = state.largest > later.largest ? state.largest : later.largest;
  const float keep = exp_one(state.largest - largest), add = exp_one(later.largest - largest);
  state.largest = largest;
  state.total = state.total * keep + later.total * add;
  for (int64_t d = 0; d < dim; d += 16) {
    const F scaled = f_mul(load_some(sums + d, dim - d), f_set(keep));
    store_some(sums + d, f_fma(load_some(later_sums + d, dim - d), f_set(add), scaled), dim - d);
  }
}

inline void finish(const State& state, const float* sums, float* out, int64_t dim) {
  const F scale = f_set(1.0f / state.total);
  for (int64_t d = 0; d < dim; d += 16) store_some(out + d, f_mul(load_some(sums + d, dim - d), scale), dim - d);
}

// Turns scores of positions [base, base + count) into e^(score - largest) where a row sees them, 0 elsewhere; `states`
// receive each row's largest score and the sum.
inline void exponentiate(const Rows& rows, int64_t base, int64_t count, float (*scores)[kKvSplit], State* states) {
  for (int r = 0; r < rows.count; r++) {
    const int64_t low = rows.low[r] - base, high = rows.high[r] - base;
    if (low >= count || high <= 0) {
      states[r] = {0.0f, 0.0f};
      for (int64_t p = 0; p < count; p++) scores[r][p] = 0.0f;
      continue;
    }
    for (int64_t p = 0; p < low; p++) scores[r][p] = -__builtin_inff();
    for (int64_t p = high < count ? high : count; p < count; p++) scores[r][p] = -__builtin_inff();
    F top = f_load(scores[r]);
    for (int64_t p = 16; p < count; p += 16) top = f_max(top, f_load(scores[r] + p));
    const float largest = f_largest(top);
    F total = f_zero();
    for (int64_t p = 0; p < count; p += 16) {
      const F e = f_exp(f_sub(f_load(scores[r] + p), f_set(largest)));
      f_store(scores[r] + p, e);
      total = f_add(total, e);
    }
    states[r] = {largest, f_sum(total)};
  }
}

// One split for tiles of rows: adds its weighted values to `sums`. `keys` and `values` point to those of positions
// [base, base + count), count a multiple of 16; many_rows rounds it up to a multiple of kSpan for `keys`.
template <class T>
inline void few_rows(const Rows* tiles, int tile_count, const T* const* keys, const T* const* values, int64_t base,
                     int64_t count, int64_t dim, State* states, float (*sums)[kMaxHeadDim]) {
  alignas(64) float scores[kRowTile][kKvSplit];
  for (int t = 0; t < tile_count; t++) {
    score(tiles[t], keys, values, count, dim, scores);
    exponentiate(tiles[t], base, count, scores, states + t * kRowTile);
    weigh_all(values, count, dim, scores, sums + t * kRowTile);
  }
}

template <class T>
inline void many_rows(const Rows* tiles, int tile_count, const T* const* keys, const T* const* values, int64_t base,
                      int64_t count, int64_t dim, State* states, float (*sums)[kMaxHeadDim]) {
  alignas(64) float scores[kAttentionRows][kKvSplit];
  alignas(64) float floats[kMaxHeadDim * kSpan];
  for (int64_t p = 0; p < count; p += kSpan) {
    transpose_keys(keys + p, dim, floats);
    for (int t = 0; t < tile_count; t++)
      score_transposed(tiles[t], floats, dim, (float(*)[kKvSplit])(scores[t * kRowTile] + p));
  }
  for (int t = 0; t < tile_count; t++)
    exponentiate(tiles[t], base, count, scores + t * kRowTile, states + t * kRowTile);
  for (int64_t p = 0; p < count; p += kSpan) {
    const int64_t here = count - p < kSpan ? count - p : kSpan;
    const float* lines[kSpan];
    for (int64_t i = 0; i < here; i++) {
      float* line = floats + i * dim;
      for (int64_t d = 0; d < dim; d += kLanes) v_store(line + d, v_load(values[p + i] + d));
      lines[i] = line;
    }
    for (int t = 0; t < tile_count; t++)
      weigh_all(lines, here, dim, (const float(*)[kKvSplit])(scores[t * kRowTile] + p), sums + t * kRowTile);
  }
}

template <class T> void attend_as(const Attention* a, const AttentionItem* item) {
  const int64_t dim = a->dim, group = a->heads / a->kv_heads, rows = item->tokens * group;
  const int64_t padded = (dim + 15) / 16 * 16;
  const int64_t context = a->context_lens[item->request], request_start = a->query_starts[item->request];
  const int64_t first_position = context - (a->query_starts[item->request + 1] - request_start);
  const int32_t* table = a->block_tables + item->request * a->table_stride;
  alignas(64) float q[kAttentionRows][kMaxHeadDim];
  alignas(64) float sums[kAttentionRows][kMaxHeadDim];
  State states[kAttentionRows];
  // Where head_dim is not a multiple of 16, keys and values are copied to rows padded with zeros.
  T* staged = dim == padded ? nullptr : (T*)__builtin_alloca(2 * kKvSplit * padded * sizeof(T));
  const float scale = 1.0f / __builtin_sqrtf((float)dim);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t token = item->first_token + r / group, head = item->kv_head * group + r % group;
    const float* from = a->q + (token * a->heads + head) * dim;
    for (int64_t d = 0; d < padded; d++) q[r][d] = d < dim ? from[d] * scale : 0.0f;
    states[r] = {0.0f, 0.0f};
  }
  const int64_t earliest = first_position + item->first_token - request_start;
  const int64_t end = earliest + item->tokens;  // one past the last visible position of the last token
  const int64_t begin = a->window && earliest - a->window + 1 > 0 ? earliest - a->window + 1 : 0;
  Rows tiles[kAttentionRows / kRowTile];
  const int tile_count = (int)((rows + kRowTile - 1) / kRowTile);
  for (int t = 0; t < tile_count; t++) {
    const int64_t r = t * kRowTile;
    tiles[t].count = (int)(rows - r < kRowTile ? rows - r : kRowTile);
    for (int i = 0; i < kRowTile; i++) {  // missing rows repeat the first; their results are not used
      const int64_t row = i < tiles[t].count ? r + i : r;
      tiles[t].q[i] = q[row];
      tiles[t].high[i] = earliest + row / group + 1;
      tiles[t].low[i] = a->window && tiles[t].high[i] > a->window ? tiles[t].high[i] - a->window : 0;
    }
  }
  for (int64_t split = item->first_split; split < item->last_split; split++) {
    // Only the groups of 16 positions that hold a visible one: the split's other groups would add exact zeros.
    const int64_t split_begin = split * kKvSplit, split_end = split_begin + kKvSplit;
    const int64_t from = begin > split_begin ? begin : split_begin, to = end < split_end ? end : split_end;
    if (from >= to) continue;
    const int64_t base = from / 16 * 16, count = (to + 15) / 16 * 16 - base;
    const T *keys[kKvSplit], *values[kKvSplit];
    for (int64_t p = 0; p < count; p++) {
      const int64_t position = base + p < from ? from : base + p >= to ? to - 1 : base + p;
      const int64_t block = table[position / a->block_size], offset = position % a->block_size;
      const int64_t at = ((block * a->kv_heads + item->kv_head) * a->block_size + offset) * dim;
      keys[p] = (const T*)a->keys + at;
      values[p] = (const T*)a->values + at;
      if (staged) {
        T *key = staged + p * padded, *value = staged + (kKvSplit + p) * padded;
        memset(key + dim, 0, (padded - dim) * sizeof(T));
        memset(value + dim, 0, (padded - dim) * sizeof(T));
        keys[p] = (const T*)memcpy(key, keys[p], dim * sizeof(T));
        values[p] = (const T*)memcpy(value, values[p], dim * sizeof(T));
      } else if (kPrefetchToL2 && p < kPrefetchPositions) {
        prefetch_vector(keys[p], dim);  // `score` prefetches the later ones
      }
    }
    for (int64_t p = count; p < kKvSplit; p++) keys[p] = keys[count - 1];  // their scores are not used
    State later[kAttentionRows];
    alignas(64) float later_sums[kAttentionRows][kMaxHeadDim];
    for (int r = 0; r < tile_count * kRowTile; r++) memset(later_sums[r], 0, padded * sizeof(float));
    const auto split_rows = rows < kManyRows ? few_rows<T> : many_rows<T>;
    split_rows(tiles, tile_count, keys, values, base, count, padded, later, later_sums);
    for (int64_t r = 0; r < rows; r++) merge_split(states[r], sums[r], later[r], later_sums[r], dim);
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t token = item->first_token + r / group, head = item->kv_head * group + r % group;
    if (item->partial) {
      float* partial = item->partial + r * (dim + 2);
      memcpy(partial, sums[r], dim * sizeof(float));
      partial[dim] = states[r].largest;
      partial[dim + 1] = states[r].total;
    } else {
      finish(states[r], sums[r], a->out + (token * a->heads + head) * dim, dim);
    }
  }
}

void attend(const Attention* a, const AttentionItem* item) {
  if (a->half) attend_as<uint16_t>(a, item);
  else attend_as<float>(a, item);
}

// Merges items that differ only in their splits, given in ascending order.
void merge(const Attention* a, const AttentionItem* items, int count) {
  const int64_t dim = a->dim, group = a->heads / a->kv_heads;
  alignas(64) float sums[kMaxHeadDim];
  for (int64_t r = 0; r < items->tokens * group; r++) {
    State state = {0.0f, 0.0f};
    for (int i = 0; i < count; i++) {
      const float* partial = items[i].partial + r * (dim + 2);
      merge_split(state, sums, State{partial[dim], partial[dim + 1]}, partial, dim);
    }
    const int64_t token = items->first_token + r / group, head = items->kv_head * group + r % group;
    finish(state, sums, a->out + (token * a->heads + head) * dim, dim);
  }
}

}  // namespace
