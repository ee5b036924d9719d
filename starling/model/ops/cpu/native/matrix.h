// y = x W for many activation rows, on the matrix unit of unit_*.h. kMatrixBlocks blocks of weights at a time are
// unpacked to L1, as signed bytes minus their zero points, and multiplied by one tile of activations after another. The
// unit's products are exact integers and the rest is done as in linear.h, so results are bit-identical.
#pragma once

namespace {

constexpr int kUnpackColumns = 512, kUnpackGroups = kUnpackColumns / 32;  // unpacked at a time, at most
// Up to this many tiles, half as many columns at a time: more weights leave no room in L1 for what else is read, and
// unpacking costs more than it gains. 8 answers at once took 0.28 ms instead of 0.39, 32 tokens of a prompt 0.48
// instead of 0.58; 256 tokens took as long either way (Granite Rapids, 4,096 x 4,096 on two threads).
constexpr int kFewTiles = 4;

struct MatrixPiece {  // some columns of kMatrixBlocks blocks
  alignas(64) int8_t weights[kMatrixBlocks][kUnpackColumns * kBlockRows];  // as MatrixUnit::product reads them
  alignas(64) float scales[kUnpackGroups][kMatrixBlocks][16];
};

template <class Weights>
inline void unpack_group(const Weights& weights, I zeros, int64_t columns, int8_t* out) {
  I four = i_add(zeros, i_left<8>(zeros));
  four = i_add(four, i_left<16>(four));  // each row's zero point in each of its 4 bytes
  for (int pair = 0; pair < columns / 8; pair++) {
    weights.prefetch(pair);
    MatrixUnit::store(out + pair * 128, i_sub_bytes(weights.step(pair, 0), four),
                      i_sub_bytes(weights.step(pair, 1), four));
  }
}

// Unpacks `count` groups into block j of the piece.
inline void unpack(const Linear* w, const Units& units, int64_t count, int j, MatrixPiece& piece) {
  for (int64_t g = 0; g < count; g++) {
    const uint8_t* at = units.weight + g * units.bytes;
    int8_t* out = piece.weights[j] + g * w->group * kBlockRows;
    if (w->bits == 8) unpack_group(EightBits{at, at}, units.zero(g), w->group, out);
    else unpack_group(Nibbles{at, at}, units.zero(g), w->group, out);
    f_store(piece.scales[g][j], units.scale(g));
  }
}

// sums[row][block] += the group's scales times its products, for a tile of rows of P planes; `scales` are its rows'.
template <int B, int P>
inline void add_products(const int32_t (*products)[kMatrixPlanes][16], const float (*weight_scales)[16],
                         const float* scales, int rows, float (*sums)[kMatrixBlocks][16]) {
  F weight_scale[B];
  for (int j = 0; j < B; j++) weight_scale[j] = f_load(weight_scales[j]);
  for (int r = 0; r < rows; r++) {
    const F scale = f_set(scales[r]);
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) {
      const I high = i_load(products[j][r * P]);
      const I total = P == 1 ? high : i_add(i_left<8>(high), i_load(products[j][r * P + P - 1]));
      f_store(sums[r][j], f_fma(f_from(total), f_mul(weight_scale[j], scale), f_load(sums[r][j])));
    }
  }
}

// Tiles [first_tile, last_tile) times the B blocks from b on.
template <int B>
void matrix_blocks(MatrixUnit& unit, const Linear* w, int64_t b, const Activations* a, int first_tile, int last_tile,
                   float* y) {
  alignas(64) float kept[kMaxTokens][kMatrixBlocks][16];
  alignas(64) int32_t products[2][kMatrixBlocks][kMatrixPlanes][16];
  MatrixPiece piece;
  const int64_t group = w->group, groups = w->columns / group, blocks = blocks_of(w);
  const int tiles = last_tile - first_tile, from_row = a->tile[first_tile].first;
  const int to_row = a->tile[last_tile - 1].first + a->tile[last_tile - 1].rows;
  const int64_t step = (tiles > kFewTiles ? kUnpackColumns : kUnpackColumns / 2) / group;  // groups in a piece
  for (int i = from_row; i < to_row; i++)
    for (int j = 0; j < B; j++) f_store(kept[i][j], f_zero());
  for (int64_t first = 0; first < groups; first += step) {
    const int64_t last = first + step < groups ? first + step : groups;
    const int count = (int)(last - first);
    const uint8_t* next[B];  // what follows each block's piece: the tiles prefetch it in turn, a group at a time,
    int64_t bytes = 0;       // since unpacking would prefetch too much at once. `bytes`: of one group
    for (int j = 0; j < B; j++) {
      const Units units = units_at(w, b + j, first);
      const int64_t later = b + B + j < blocks ? b + B + j : blocks - 1;
      next[j] = (last < groups ? units_at(w, b + j, last) : units_at(w, later, 0)).weight;
      bytes = units.bytes;
      unpack(w, units, count, j, piece);
    }
    STARLING_COMPILER_BARRIER;
    const auto multiply = [&](int item) {
      const Tile& tile = a->tile[first_tile + item / count];
      const int planes = tile.rows * tile.planes, g = item % count;
      unit.set(planes);
      unit.product<B>(piece.weights[0] + g * group * kBlockRows, sizeof piece.weights[0],
                      a->planes + tile.offset + (first + g) * group * planes, (int)group, products[item % 2]);
    };
    // Each group is multiplied while the previous one's products are scaled: instructions that wait for the unit would
    // keep the core from looking further ahead.
    multiply(0);
    for (int item = 0; item < tiles * count; item++) {
      const int t = item / count, g = item % count;
      const Tile& tile = a->tile[first_tile + t];
      if (item + 1 < tiles * count) multiply(item + 1);
      for (int j = t; j < B; j += tiles)
        for (int64_t byte = g * bytes; byte < (g + 1) * bytes; byte += 64) __builtin_prefetch(next[j] + byte, 0, 2);
      const auto add = tile.planes == 1 ? add_products<B, 1> : add_products<B, 2>;
      const int64_t at = tile.first * groups + (first + g) * tile.rows;
      add(products[item % 2], piece.scales[g], a->scales + at, tile.rows, kept + tile.first);
    }
  }
  for (int i = from_row; i < to_row; i++)
    for (int j = 0; j < B; j++) {
      const int64_t row = (b + j) * kBlockRows;
      store_rows(y + a->order[i] * w->rows + row, f_load(kept[i][j]), w->rows - row);
    }
}

// The B blocks from b on, or as many as there are before `last`.
template <int B>
void blocks_before(int64_t last, MatrixUnit& unit, const Linear* w, int64_t b, const Activations* a, int first_tile,
                   int last_tile, float* y) {
  if constexpr (B > 1)
    if (last - b < B) return blocks_before<B - 1>(last, unit, w, b, a, first_tile, last_tile, y);
  matrix_blocks<B>(unit, w, b, a, first_tile, last_tile, y);
}

void matrix_linear(const Linear* w, const Activations* a, float* y, int64_t first, int64_t last, int first_tile,
                   int last_tile) {
  MatrixUnit unit(a->tile[0].run);
  for (int64_t b = first; b < last; b += kMatrixBlocks)
    blocks_before<kMatrixBlocks>(last, unit, w, b, a, first_tile, last_tile, y);
}

}  // namespace
