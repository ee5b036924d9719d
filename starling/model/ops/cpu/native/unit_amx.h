// AMX (Intel, from Sapphire Rapids on): tiles of up to 16 rows of 64 bytes. One instruction multiplies 16 x 64 by 64
// x 16 signed bytes and adds the products to 16 x 16 sums, every 16 cycles. The results are exact.
#pragma once
#include <immintrin.h>

#define STARLING_MATRIX_UNIT

namespace {

constexpr int kMatrixPlanes = 16;
constexpr int kMatrixRun = 64;
constexpr int kMatrixBlocks = 4;  // blocks of weights multiplied by an activation tile while it is in a register

class MatrixUnit {
 public:
  explicit MatrixUnit(int run) : run_(run) {}  // columns of a plane that lie together
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
  ~MatrixUnit() {
    if (planes_) _tile_release();
  }

  // Sets how many planes of activations are multiplied from now on.
  void set(int planes) {
    if (planes == planes_) return;
    planes_ = planes;
    alignas(64) uint8_t config[64] = {1};  // palette; from 16 on: bytes per row, 2 bytes a tile; from 48 on: rows
    for (int tile = 0; tile < 8; tile++) {
      config[16 + 2 * tile] = (uint8_t)(tile == kActivations ? run_ : 64);
      config[48 + tile] = (uint8_t)(tile >= kWeights ? run_ / 4 : planes);
    }
    const void* at = config;
    asm volatile("" : : "r"(at) : "memory");  // all of it is in memory: the intrinsic names only the first bytes
    _tile_loadconfig(at);
  }

  // Stores two steps, each of 4 columns of 16 rows' weights, as `product` reads them.
  static void store(int8_t* at, I first, I second) {
    i_store(at, first);
    i_store(at + 64, second);
  }

  // products[block][plane][row] = the sum over a group's columns of weight times activation. weights[block]
  // [columns / 4][16 rows][4]; a [columns / run][planes][run]. Inputs must be in memory: see STARLING_COMPILER_BARRIER.
  template <int B>
  void product(const int8_t* weights, int64_t block_bytes, const int8_t* a, int columns,
               int32_t (*products)[kMatrixPlanes][16]) const {
    _tile_zero(0);
    if constexpr (B > 1) _tile_zero(1);
    if constexpr (B > 2) _tile_zero(2);
    if constexpr (B > 3) _tile_zero(3);
    for (int k = 0; k < columns; k += run_) {
      const int8_t* here = weights + k * kBlockRows;
      _tile_loadd(4, a + k * planes_, run_);
      _tile_loadd(5, here, 64);
      _tile_dpbssd(0, 4, 5);
      if constexpr (B > 1) {
        _tile_loadd(6, here + block_bytes, 64);
        _tile_dpbssd(1, 4, 6);
      }
      if constexpr (B > 2) {
        _tile_loadd(5, here + 2 * block_bytes, 64);
        _tile_dpbssd(2, 4, 5);
      }
      if constexpr (B > 3) {
        _tile_loadd(6, here + 3 * block_bytes, 64);
        _tile_dpbssd(3, 4, 6);
      }
    }
    _tile_stored(0, products[0], 64);
    if constexpr (B > 1) _tile_stored(1, products[1], 64);
    if constexpr (B > 2) _tile_stored(2, products[2], 64);
    if constexpr (B > 3) _tile_stored(3, products[3], 64);
    STARLING_COMPILER_BARRIER;
  }

 private:
  static constexpr int kActivations = 4, kWeights = 5;  // tiles 0 to 3 hold sums, tiles from 5 on weights
  const int run_;
  int planes_ = 0;
};

}  // namespace
