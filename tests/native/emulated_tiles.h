// AMX's tiles in plain C++, as Intel's manual describes them, for machines without AMX. Included before everything
// else, it replaces the intrinsics. What the manual calls a fault ends the process, and so does the use of a tile that
// holds nothing; a register keeps nothing beyond its configured size.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_tiles {

struct Tile {
  bool set = false;  // loaded, zeroed or computed since the configuration
  int rows = 0, bytes = 0;
  int8_t data[16][64];
};
struct Registers {
  bool configured = false;
  Tile tile[8];
  ~Registers() { if (configured) fault("a thread ends with its tiles in use"); }
  [[noreturn]] static void fault(const char* what) {
    std::fprintf(stderr, "AMX: %s\n", what);
    std::abort();
  }
  Tile& at(int i, bool read) {
    if (!configured) fault("no configuration");
    if (read && !tile[i].set) fault("a tile is used that holds nothing");
    return tile[i];
  }
};
inline thread_local Registers registers;

inline void load_config(const void* at) {
  uint8_t config[64];
  std::memcpy(config, at, 64);
  if (config[0] != 1) Registers::fault("palette");
  for (int i = 1; i < 16; i++) if (config[i]) Registers::fault("reserved bytes");
  for (int i = 32; i < 48; i++) if (config[i]) Registers::fault("reserved bytes");
  for (int i = 56; i < 64; i++) if (config[i]) Registers::fault("reserved bytes");
  registers.configured = true;
  for (int i = 0; i < 8; i++) {
    Tile& tile = registers.tile[i];
    tile.bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8;
    tile.rows = config[48 + i];
    tile.set = false;
    if (tile.bytes > 64 || tile.rows > 16 || !tile.bytes != !tile.rows) Registers::fault("a tile's size");
  }
}
inline void release() {
  if (!registers.configured) Registers::fault("released twice");
  registers.configured = false;
}
inline void zero(int i) {
  Tile& tile = registers.at(i, false);
  std::memset(tile.data, 0, sizeof tile.data);
  tile.set = true;
}
inline void load(int i, const void* base, long stride) {
  zero(i);
  Tile& tile = registers.at(i, false);
  for (int r = 0; r < tile.rows; r++) std::memcpy(tile.data[r], (const char*)base + r * stride, (size_t)tile.bytes);
}
inline void store(int i, void* base, long stride) {
  const Tile& tile = registers.at(i, true);
  for (int r = 0; r < tile.rows; r++) std::memcpy((char*)base + r * stride, tile.data[r], (size_t)tile.bytes);
}
// Both signed: sums[m][n] += a[m][4k + j] * b[k][4n + j].
inline void dot(int c, int a, int b) {
  Tile &sums = registers.at(c, true), &x = registers.at(a, true), &y = registers.at(b, true);
  if (c == a || c == b || a == b) Registers::fault("one tile twice");
  if (sums.rows != x.rows || sums.bytes != y.bytes || x.bytes != 4 * y.rows || x.bytes % 4 || sums.bytes % 4)
    Registers::fault("sizes do not fit");
  for (int m = 0; m < x.rows; m++)
    for (int n = 0; n < y.bytes / 4; n++) {
      int32_t sum;
      std::memcpy(&sum, &sums.data[m][4 * n], 4);
      for (int k = 0; k < y.rows; k++)
        for (int j = 0; j < 4; j++) sum += x.data[m][4 * k + j] * y.data[k][4 * n + j];
      std::memcpy(&sums.data[m][4 * n], &sum, 4);
    }
}

}  // namespace emulated_tiles

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#define _tile_loadconfig emulated_tiles::load_config
#define _tile_release emulated_tiles::release
#define _tile_loadd emulated_tiles::load
#define _tile_stored emulated_tiles::store
#define _tile_zero emulated_tiles::zero
#define _tile_dpbssd emulated_tiles::dot
