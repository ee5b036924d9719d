// y = x W for a block of 16 output rows at a time.
//
// Every output element is summed in the same order, whichever tile computes it: groups of columns in ascending
// order, a group's products as an exact integer (or, in float32, as two chains over its even and odd columns). So a
// token's result does not depend on the other tokens.
#pragma once

namespace {

// Columns of a block that the tiles take in turn: as many as fit in L1 beside a tile's activations, unpacked to a byte
// each (8 KiB) or packed (8 KiB).
constexpr int kSpanColumns = kUnpack ? 512 : kPanelColumns;

inline float tile_limit(const Tile& tile) { return tile.planes == 1 ? 127.0f : 32639.0f; }  // 127 * 256 + 127

// Stores 16 columns in runs of `run`; the other planes' runs lie between them.
template <int run> inline void store_runs(int8_t* at, int planes, const int8_t* bytes) {
  for (int j = 0; j < 16; j += run) memcpy(at + j * planes, bytes + j, run);
}
// Stores columns k to k + 15 of a tile's group.
inline void store_columns(int8_t* group, const Tile& tile, int plane, int64_t k, I q) {
  const int planes = tile.rows * tile.planes, in_run = (int)k & (tile.run - 1);
  int8_t bytes[16], *at = group + (k - in_run) * planes + plane * tile.run + in_run;
  i_store_bytes(bytes, q);
  if (tile.run == 4) store_runs<4>(at, planes, bytes);
  else if (tile.run == 8) store_runs<8>(at, planes, bytes);
  else store_runs<16>(at, planes, bytes);
}

void quantize_row(const Activations* a, int index, int row, int64_t first, int64_t last) {
  const Tile& tile = a->tile[index];
  const int64_t group = a->group, groups = a->columns / group;
  const int stride = tile.rows * tile.planes;
  const float* x = a->x + (int64_t)a->order[tile.first + row] * a->columns + first * group;
  int8_t* planes = a->planes + tile.offset + first * group * stride;
  const int plane = row * tile.planes;
  int32_t* minus_sums = a->minus_sums + tile.offset / group + first * stride + row * tile.planes;
  float* scales = a->scales + tile.first * groups + first * tile.rows + row;
  const float limit = tile_limit(tile);
  const int64_t rows = tile.rows;
  for (int64_t g = first; g < last; g++, x += group, planes += stride * group, minus_sums += stride, scales += rows) {
    F top = f_zero(), probe = f_zero();  // a maximum may miss NaN: x - x is NaN for it and infinity, else 0
    for (int64_t k = 0; k < group; k += 16) {
      const F each = f_load(x + k);
      top = f_max(top, f_abs(each));
      probe = f_add(probe, f_sub(each, each));
    }
    const float largest = f_largest(top);
    *scales = largest / limit + f_sum(probe);
    if (!(*scales - *scales == 0.0f)) {  // NaN: so is its product with any sum, and nothing can be rounded
      for (int p = 0; p < tile.planes; p++) {
        for (int64_t k = 0; k < group; k += 16) store_columns(planes, tile, plane + p, k, i_zero());
        minus_sums[p] = 0;
      }
      continue;
    }
    const F inverse = f_set(largest > 1e-30f ? limit / largest : 0.0f);
    if (tile.planes == 1) {
      I sum = i_zero();
      for (int64_t k = 0; k < group; k += 16) {
        I q = i_from(f_mul(f_load(x + k), inverse));
        sum = i_add(sum, q);
        store_columns(planes, tile, plane, k, q);
      }
      minus_sums[0] = -i_sum(sum) & 0xffff;
    } else {
      I high_sum = i_zero(), low_sum = i_zero();
      for (int64_t k = 0; k < group; k += 16) {
        I q = i_from(f_mul(f_load(x + k), inverse));
        I high = i_right<8>(i_add(q, i_set(128))), low = i_sub(q, i_left<8>(high));
        high_sum = i_add(high_sum, high);
        low_sum = i_add(low_sum, low);
        store_columns(planes, tile, plane, k, high);
        store_columns(planes, tile, plane + 1, k, low);
      }
      minus_sums[0] = -i_sum(high_sum) & 0xffff;
      minus_sums[1] = -i_sum(low_sum) & 0xffff;
    }
  }
}

void quantize(const Activations* a, int tile, int64_t first, int64_t last) {
  for (int row = 0; row < a->tile[tile].rows; row++) quantize_row(a, tile, row, first, last);
}

// One group of a block and a tile of R rows of P planes: sums[r] += weight scale * activation scale * (integer sum).
template <int R, int P, class Weights>
STARLING_INLINE void integer_group(const Weights& weights, const int8_t* a, const int32_t* minus_sums,
                                   const float* scales, F weight_scale, I zero, F* sums, int group) {
  I acc[R * P];
#pragma GCC unroll 16
  for (int i = 0; i < R * P; i++) acc[i] = i_times_int16(zero, minus_sums[i]);
  dots<R * P>(acc, weights, a, group);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    I total = P == 1 ? acc[r] : i_add(i_left<8>(acc[r * P]), acc[r * P + P - 1]);
    sums[r] = f_fma(f_from(total), f_mul(weight_scale, f_set(scales[r])), sums[r]);
  }
}

inline void store_rows(float* y, F sum, int64_t rows) {
  if (rows >= 16) {
    f_store(y, sum);
  } else {
    float all[16];
    f_store(all, sum);
    memcpy(y, all, rows * sizeof(float));
  }
}

struct Units {  // units of storage: a block's groups, from one on to the end of its panel
  const uint8_t* weight;
  const uint16_t* scales;
  const uint8_t* zeros;  // null: 128
  int64_t bytes;         // of one group's weights
  inline F scale(int64_t i) const { return f_load_half(scales + i * kBlockRows); }
  inline I zero(int64_t i) const { return zeros ? i_load_nibbles(zeros + i * 8) : i_set(128); }
  inline Units after(int64_t i) const {  // the units from the i-th on
    return Units{weight + i * bytes, scales + i * kBlockRows, zeros ? zeros + i * 8 : nullptr, bytes};
  }
};

inline int64_t blocks_of(const Linear* w) { return (w->rows + kBlockRows - 1) / kBlockRows; }

inline Units units_at(const Linear* w, int64_t b, int64_t g) {
  const int64_t bytes = w->group * kBlockRows * w->bits / 8;
  const int64_t unit = unit_index(blocks_of(w), w->columns / w->group, w->group, b, g);
  return Units{w->weight + unit * bytes, w->scales ? w->scales + unit * kBlockRows : nullptr,
               w->zeros ? w->zeros + unit * 8 : nullptr, bytes};
}

STARLING_INLINE void prefetch_scales(const Units& units, int64_t count) {
  for (int64_t i = 0; i < count; i += 2) __builtin_prefetch(units.scales + i * kBlockRows);
  for (int64_t i = 0; units.zeros && i < count; i += 8) __builtin_prefetch(units.zeros + i * 8);
}

// Blocks [first_block, last_block), all of one stripe, times one tile, weights straight from memory: for a step of few
// tokens. A panel's activations stay in L1 while the blocks' weights stream past.
template <int R, int P, class Weights>
STARLING_NOINLINE void stream_tile(const Linear* w, const Activations* a, const Tile& tile, float* y,
                                   int64_t first_block, int64_t last_block) {
  alignas(64) float kept[kStripeBlocks][R * 16];
  const int64_t blocks = blocks_of(w), groups = a->columns / a->group;
  const int group = (int)a->group;
  const int8_t* planes = a->planes + tile.offset;
  const int32_t* minus_sums = a->minus_sums + tile.offset / group;
  const float* scales = a->scales + tile.first * groups;
  const int64_t step = kPanelColumns / group;
  const int64_t ahead = kPrefetchBytes / (group * kBlockRows * w->bits / 8);
  Units start = units_at(w, first_block, 0);
  for (int64_t first = 0; first < groups; first += step) {
    const int64_t last = first + step < groups ? first + step : groups, count = last - first;
    const Units next_start = last < groups ? units_at(w, first_block, last)
                                           : units_at(w, last_block < blocks ? last_block : first_block, 0);
    Units units = start;  // of block b; the next blocks' follow, `count` units each
    for (int64_t b = first_block; b < last_block; b++) {
      const Units next = b + 1 < last_block ? units.after(count) : next_start;
      prefetch_scales(next, step);
      F sums[R];
      for (int r = 0; r < R; r++) sums[r] = first ? f_load(kept[b - first_block] + r * 16) : f_zero();
      for (int64_t g = first; g < last; g++) {
        const int64_t i = g - first, soon = g + ahead - last;
        const uint8_t* later = soon < 0 ? units.weight + (i + ahead) * units.bytes : next.weight + soon * units.bytes;
        integer_group<R, P>(Weights{units.weight + i * units.bytes, later}, planes + g * R * P * group,
                            minus_sums + g * R * P, scales + g * R, units.scale(i), units.zero(i), sums, group);
      }
      const int64_t row = b * kBlockRows;
      for (int r = 0; r < R; r++) {
        if (last < groups) f_store(kept[b - first_block] + r * 16, sums[r]);
        else store_rows(y + a->order[tile.first + r] * w->rows + row, sums[r], w->rows - row);
      }
      units = next;
    }
    start = next_start;
  }
}

// Groups [first, last) of a block and one tile. Sums are kept between calls, those of packed row i at kept[16 * i].
template <int R, int P, class Weights>
STARLING_NOINLINE void panel_tile(const Units& units, const Weights& start, int64_t first, int64_t last,
                                  const Activations* a, const Tile& tile, float* kept) {
  const int64_t groups = a->columns / a->group;
  const int group = (int)a->group;
  const int8_t* planes = a->planes + tile.offset;
  const int32_t* minus_sums = a->minus_sums + tile.offset / group;
  const float* scales = a->scales + tile.first * groups;
  F sums[R];
  for (int r = 0; r < R; r++) sums[r] = f_load(kept + (tile.first + r) * 16);
  for (int64_t g = first; g < last; g++)
    integer_group<R, P>(start.after((g - first) * group), planes + g * R * P * group, minus_sums + g * R * P,
                        scales + g * R, units.scale(g - first), units.zero(g - first), sums, group);
  for (int r = 0; r < R; r++) f_store(kept + (tile.first + r) * 16, sums[r]);
}

// Calls run.call<rows, planes per row>() for the tile's shape, one of those that rows_of_tile gives.
template <int P, int R = kPlanes / P, class Run> inline void for_rows(int rows, const Run& run) {
  if constexpr (R == 0) {
    __builtin_trap();
  } else if constexpr (rows_of_tile(R, P, kPlanes) == R) {
    if (rows == R) run.template call<R, P>();
    else for_rows<P, R - 1>(rows, run);
  } else {
    for_rows<P, R - 1>(rows, run);
  }
}
template <class Run> inline void for_shape(const Tile& tile, const Run& run) {
  if (tile.planes == 1) for_rows<1>(tile.rows, run);
  else for_rows<2>(tile.rows, run);
}

template <class Weights> struct Stream {
  const Linear* w;
  const Activations* a;
  const Tile& tile;
  float* y;
  int64_t first, last;
  template <int R, int P> void call() const { stream_tile<R, P, Weights>(w, a, tile, y, first, last); }
};

template <class Weights> struct Panel {
  const Units& units;
  const Weights& start;
  int64_t first, last;
  const Activations* a;
  const Tile& tile;
  float* kept;
  template <int R, int P> void call() const { panel_tile<R, P>(units, start, first, last, a, tile, kept); }
};

// Tiles [first_tile, last_tile) of block b, kSpanColumns at a time. The first tile brings the weights to L1 for the
// others, unpacked if that saves them time (kUnpack), and prefetches the next ones.
void panel_block(const Linear* w, int64_t b, const Activations* a, int first_tile, int last_tile, float* y) {
  alignas(64) float kept[kMaxTokens * 16];
  alignas(64) uint8_t bytes[kUnpack ? kSpanColumns * kBlockRows : 1];
  const int64_t group = w->group, groups = w->columns / group, step = kSpanColumns / group, blocks = blocks_of(w);
  const int from_row = a->tile[first_tile].first;
  const int to_row = a->tile[last_tile - 1].first + a->tile[last_tile - 1].rows;
  for (int i = from_row; i < to_row; i++) f_store(kept + i * 16, f_zero());
  for (int64_t first = 0; first < groups; first += step) {
    const int64_t last = first + step < groups ? first + step : groups;
    const Units units = units_at(w, b, first);
    const uint8_t* next = (last < groups ? units_at(w, b, last) : units_at(w, b + 1 < blocks ? b + 1 : b, 0)).weight;
    for (int t = first_tile; t < last_tile; t++) {
      const auto compute = [&](auto weights) {
        for_shape(a->tile[t], Panel<decltype(weights)>{units, weights, first, last, a, a->tile[t], kept});
      };
      const uint8_t* ahead = t == first_tile ? next : units.weight;
      if (w->bits == 8) compute(EightBits{units.weight, ahead});
      else if (!kUnpack) compute(Nibbles{units.weight, ahead});
      else if (t == first_tile) compute(Unpacking{{units.weight, ahead}, bytes});
      else compute(Unpacked{bytes});
    }
  }
  for (int i = from_row; i < to_row; i++) {
    const int64_t row = b * kBlockRows;
    store_rows(y + a->order[i] * w->rows + row, f_load(kept + i * 16), w->rows - row);
  }
}

// R rows of float32 activations times `columns` columns; load(k) gives the 16 weights of column k.
template <int R, class Load>
STARLING_INLINE void float_group(const Load& load, const float* const* x, int64_t columns, F scale, F* sums) {
  F even[R], odd[R];
  for (int r = 0; r < R; r++) even[r] = odd[r] = f_zero();
  for (int64_t k = 0; k < columns; k += 2) {
    const F first = load(k), second = load(k + 1);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      even[r] = f_fma(first, f_set(x[r][k]), even[r]);
      odd[r] = f_fma(second, f_set(x[r][k + 1]), odd[r]);
    }
  }
  for (int r = 0; r < R; r++) sums[r] = f_fma(f_add(even[r], odd[r]), scale, sums[r]);
}

template <class Load>
inline void float_rows(const Load& load, const Activations* a, int64_t column, int64_t columns, F scale, float* kept) {
  for (int row = 0; row < a->rows;) {
    const float* x[kFloatRows];
    F sums[kFloatRows];
    const int left = a->rows - row, take = left >= kFloatRows ? kFloatRows : 1;
    for (int r = 0; r < take; r++) {
      x[r] = a->x + (row + r) * a->columns + column;
      sums[r] = f_load(kept + (row + r) * 16);
    }
    if (take == kFloatRows) float_group<kFloatRows>(load, x, columns, scale, sums);
    else float_group<1>(load, x, columns, scale, sums);
    for (int r = 0; r < take; r++) f_store(kept + (row + r) * 16, sums[r]);
    row += take;
  }
}

struct LoadFloat {
  const float* at;
  inline F operator()(int64_t k) const { return f_load(at + k * 16); }
};
struct LoadHalf {
  const uint16_t* at;
  inline F operator()(int64_t k) const {
    __builtin_prefetch(at + k * 16 + kPrefetchBytes / 2);
    return f_load_half(at + k * 16);
  }
};

// Exact float32 activations. Weights are (q - zero) as floats, scaled group by group, or fp16 as they are.
void float_block(const Linear* w, int64_t b, const Activations* a, float* y) {
  alignas(64) float kept[kMaxTokens * 16];
  alignas(64) float floats[128 * 16];
  const int64_t group = w->group;
  for (int i = 0; i < a->rows; i++) f_store(kept + i * 16, f_zero());
  for (int64_t g = 0; g < w->columns / group; g++) {
    const Units units = units_at(w, b, g);
    if (w->bits == 16) {
      float_rows(LoadHalf{(const uint16_t*)units.weight}, a, g * group, group, f_set(1.0f), kept);
      continue;
    }
    const F zero = f_from(units.zero(0));
    const I mask = i_set(w->bits == 4 ? 15 : 255);
    for (int64_t k = 0; k < group; k += 4) {
      const int64_t word = w->bits == 4 ? k / 8 : k / 4;
      const I bytes = i_load(units.weight + word * 64);
      const int nibble = w->bits == 4 && k % 8 ? 4 : 0;
      for (int j = 0; j < 4; j++)
        f_store(floats + (k + j) * 16, f_sub(f_from(i_and(i_right_by(bytes, 8 * j + nibble), mask)), zero));
    }
    float_rows(LoadFloat{floats}, a, g * group, group, units.scale(0), kept);
  }
  float* at = y + b * kBlockRows;
  for (int i = 0; i < a->rows; i++) store_rows(at + i * w->rows, f_load(kept + i * 16), w->rows - b * kBlockRows);
}

}  // namespace

#ifdef STARLING_MATRIX_UNIT
#include "matrix.h"
#endif

namespace {

void linear(const Linear* w, const Activations* a, Precision precision, float* y, int64_t first, int64_t last,
            int first_tile, int last_tile) {
  if (precision == kFloat32 || w->bits == 16) {
    for (int64_t b = first; b < last; b++) float_block(w, b, a, y);
#ifdef STARLING_MATRIX_UNIT
  } else if (a->tile[0].run > 4) {
    matrix_linear(w, a, y, first, last, first_tile, last_tile);
#endif
  } else if (a->tiles == 1) {
    const Tile& tile = a->tile[0];
    if (w->bits == 4) for_shape(tile, Stream<Nibbles>{w, a, tile, y, first, last});
    else for_shape(tile, Stream<EightBits>{w, a, tile, y, first, last});
  } else {
    for (int64_t b = first; b < last; b++) panel_block(w, b, a, first_tile, last_tile, y);
  }
}

}  // namespace
