// ARM's matrix instructions (i8mm: Neoverse V1 and N2, Apple's M2 and later): one multiplies 2 x 8 by 8 x 2 signed
// bytes and adds the products to 2 x 2 sums, twice as many as a dot-product instruction. The results are exact.
#pragma once

#define STARLING_MATRIX_UNIT

namespace {

constexpr int kMatrixPlanes = 16;
constexpr int kMatrixRun = 8;
constexpr int kMatrixBlocks = 2;  // blocks of weights that share L1

class MatrixUnit {
 public:
  explicit MatrixUnit(int) {}
  void set(int planes) { planes_ = planes; }

  // Stores two steps, each of 4 columns of 16 rows' weights, as `product` reads them: 8 columns of a row together.
  static void store(int8_t* at, I first, I second) {
    for (int i = 0; i < 4; i++) {
      vst1q_s8(at + i * 32, vreinterpretq_s8_s32(vzip1q_s32(first.q[i], second.q[i])));
      vst1q_s8(at + i * 32 + 16, vreinterpretq_s8_s32(vzip2q_s32(first.q[i], second.q[i])));
    }
  }

  // products[block][plane][row] = the sum over a group's columns of weight times activation. weights[block]
  // [columns / 8][16 rows][8]; a [columns / 8][planes][8], and readable for three planes more.
  template <int B>
  void product(const int8_t* weights, int64_t block_bytes, const int8_t* a, int columns,
               int32_t (*products)[kMatrixPlanes][16]) const {
    for (int plane = 0; plane < planes_; plane += 4)
      for (int b = 0; b < B; b++)
        four_planes(weights + b * block_bytes, a + plane * 8, columns, products[b] + plane);
  }

 private:
  void four_planes(const int8_t* weights, const int8_t* a, int columns, int32_t (*products)[16]) const {
    int32x4_t sums[8][2];  // of rows 2r and 2r + 1 with planes 2p and 2p + 1: (2r, 2p), (2r, 2p + 1), (2r + 1, 2p) ...
    unrolled<8>([&](auto r) { sums[r.value][0] = sums[r.value][1] = vdupq_n_s32(0); });
    for (int k = 0; k < columns; k += 8, a += planes_ * 8, weights += 8 * kBlockRows) {
      const int8x16_t first = vld1q_s8(a), second = vld1q_s8(a + 16);
      unrolled<8>([&](auto r) {
        const int8x16_t rows = vld1q_s8(weights + r.value * 16);
        sums[r.value][0] = vmmlaq_s32(sums[r.value][0], rows, first);
        sums[r.value][1] = vmmlaq_s32(sums[r.value][1], rows, second);
      });
    }
    unrolled<4>([&](auto i) {
      unrolled<2>([&](auto p) {
        const int32x4_t low = sums[2 * i.value][p.value], high = sums[2 * i.value + 1][p.value];
        vst1q_s32(&products[2 * p.value][4 * i.value], vuzp1q_s32(low, high));
        vst1q_s32(&products[2 * p.value + 1][4 * i.value], vuzp2q_s32(low, high));
      });
    });
  }

  int planes_ = 0;
};

}  // namespace
