#include "repack.h"

#include <cmath>
#include <vector>

namespace {

// Nibble i of an AWQ word holds this one of its 8 columns (AutoAWQ's order).
constexpr int kColumnOfNibble[8] = {0, 2, 4, 6, 1, 3, 5, 7};

inline uint64_t nibbles_to_bytes(uint32_t word) {  // nibble i → byte i
  uint64_t x = word;
  x = (x | x << 16) & 0x0000ffff0000ffffull;
  x = (x | x << 8) & 0x00ff00ff00ff00ffull;
  return (x | x << 4) & 0x0f0f0f0f0f0f0f0full;
}

inline uint16_t half_of(float x) {  // x >= 0, below fp16's largest: to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (bits < 0x38800000) {
    float tiny = x + 0.5f;
    memcpy(&bits, &tiny, 4);
    return (uint16_t)(bits - 0x3f000000);
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return (uint16_t)((bits - 0x38000000) >> 13);
}

}  // namespace

void repack_awq(const uint32_t* qweight, const uint32_t* qzeros, const uint16_t* scales, int64_t rows, int64_t columns,
                int64_t group, uint8_t* weight, uint16_t* packed_scales, uint8_t* zeros, int64_t first, int64_t last) {
  const int64_t words = rows / 8, groups = columns / group, blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t chunk = 0; chunk < columns / 8; chunk++) {  // all blocks of one cache line of words, then the next line
    for (int64_t b = first; b < last; b++) {
      const int64_t unit = unit_index(blocks, groups, group, b, chunk * 8 / group);
      uint8_t* out = weight + (unit * (group / 8) + chunk % (group / 8)) * 64;
      for (int64_t half = 0; half < 2; half++) {
        const int64_t word = b * 2 + half;
        if (word >= words) {
          memset(out + half * 32, 0, 32);
          continue;
        }
        for (int j = 0; j < 4; j++) {
          const uint64_t low = nibbles_to_bytes(qweight[(chunk * 8 + j) * words + word]);
          const uint64_t high = nibbles_to_bytes(qweight[(chunk * 8 + 4 + j) * words + word]);
          const uint64_t both = low | high << 4;
          for (int i = 0; i < 8; i++) out[(half * 8 + kColumnOfNibble[i]) * 4 + j] = (uint8_t)(both >> (8 * i));
        }
      }
    }
  }
  for (int64_t b = first; b < last; b++) {
    for (int64_t g = 0; g < groups; g++) {
      const int64_t unit = unit_index(blocks, groups, group, b, g);
      uint16_t* scale = packed_scales + unit * kBlockRows;
      uint8_t zero[16] = {};
      for (int64_t half = 0; half < 2; half++) {
        const int64_t word = b * 2 + half;
        for (int i = 0; i < 8; i++) scale[half * 8 + i] = word < words ? scales[g * rows + word * 8 + i] : 0;
        if (word >= words) continue;
        const uint64_t bytes = nibbles_to_bytes(qzeros[g * words + word]);
        for (int i = 0; i < 8; i++) zero[half * 8 + kColumnOfNibble[i]] = (uint8_t)(bytes >> (8 * i));
      }
      for (int i = 0; i < 8; i++) zeros[unit * 8 + i] = (uint8_t)(zero[2 * i] | zero[2 * i + 1] << 4);
    }
  }
}

void repack_half_to_8(const uint16_t* matrix, int64_t rows, int64_t columns, int64_t group, uint8_t* weight,
                      uint16_t* scales, int64_t first, int64_t last, const Kernels* kernels) {
  const int64_t groups = columns / group, blocks = (rows + kBlockRows - 1) / kBlockRows;
  std::vector<float> row(columns);
  for (int64_t b = first; b < last; b++) {
    for (int64_t r = 0; r < kBlockRows; r++) {
      const int64_t n = b * kBlockRows + r;
      if (n < rows) kernels->widen(matrix + n * columns, row.data(), columns);
      for (int64_t g = 0; g < groups; g++) {
        const int64_t unit = unit_index(blocks, groups, group, b, g);
        float largest = 0;
        for (int64_t k = 0; n < rows && k < group; k++) largest = std::fmax(largest, std::fabs(row[g * group + k]));
        const uint16_t scale = half_of(largest / 127);
        scales[unit * kBlockRows + r] = scale;
        float exact;
        uint16_t wide[16] = {scale};
        float floats[16];
        kernels->widen(wide, floats, 16);
        exact = floats[0];
        for (int64_t k = 0; k < group; k++) {
          float q = n < rows && exact > 0 ? std::nearbyint(row[g * group + k] / exact) : 0;
          q = q > 127 ? 127 : q < -128 ? -128 : q;
          weight[(unit * (group / 4) + k / 4) * 64 + r * 4 + k % 4] = (uint8_t)((int)q + 128);
        }
      }
    }
  }
}

void repack_half(const uint16_t* matrix, int64_t rows, int64_t columns, int64_t group, uint16_t* weight, int64_t first,
                 int64_t last) {
  const int64_t groups = columns / group, blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t b = first; b < last; b++)
    for (int64_t r = 0; r < kBlockRows; r++) {
      const int64_t n = b * kBlockRows + r;
      for (int64_t g = 0; g < groups; g++) {
        uint16_t* out = weight + unit_index(blocks, groups, group, b, g) * group * kBlockRows + r;
        for (int64_t k = 0; k < group; k++) out[k * kBlockRows] = n < rows ? matrix[n * columns + g * group + k] : 0;
      }
    }
}
