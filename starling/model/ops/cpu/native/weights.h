// How dot products read a block's weights: where they lie, and what to prefetch meanwhile. Included by the vector
// headers, whose types and constants it uses.
#pragma once

namespace {

// Prefetches one line of the weights ahead; where two distances are used, into L2, and a nearer line from L2 into L1.
STARLING_INLINE void prefetch_line(const uint8_t* ahead, const uint8_t* at) {
  if constexpr (kNearBytes > 0) {
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(at + kNearBytes, 0, 3);
  } else {
    __builtin_prefetch(ahead, 0, 3);
  }
}

struct Nibbles {  // 64 bytes: 16 rows x 8 columns of 4 bits
  static constexpr bool kEight = false;
  const uint8_t* at;
  const uint8_t* ahead;  // what to prefetch while `at` is read
  inline Nibbles after(int64_t columns) const { return {at + columns * 8, ahead + columns * 8}; }
  inline I step(int pair, int half) const { return i_nibbles(i_load(at + pair * 64), half); }
  STARLING_INLINE void prefetch(int pair) const { prefetch_line(ahead + pair * 64, at + pair * 64); }
};
struct EightBits {  // 64 bytes: 16 rows x 4 columns of 8 bits
  static constexpr bool kEight = true;
  const uint8_t* at;
  const uint8_t* ahead;
  inline EightBits after(int64_t columns) const { return {at + columns * 16, ahead + columns * 16}; }
  inline I step(int pair, int half) const { return i_load(at + pair * 128 + half * 64); }
  STARLING_INLINE void prefetch(int pair) const {
    if constexpr (kNearBytes > 0) {
#pragma GCC unroll 2
      for (int line = 0; line < 128; line += 64) prefetch_line(ahead + pair * 128 + line, at + pair * 128 + line);
    }
  }
};

// Nibbles that are also written to `out`, one to a byte; Unpacked reads them from there, in L1.
struct Unpacking {
  static constexpr bool kEight = false;
  Nibbles packed;
  uint8_t* out;
  inline Unpacking after(int64_t columns) const { return {packed.after(columns), out + columns * 16}; }
  inline I step(int pair, int half) const {
    const I step = packed.step(pair, half);
    i_store(out + pair * 128 + half * 64, step);
    return step;
  }
  STARLING_INLINE void prefetch(int pair) const { packed.prefetch(pair); }
};
struct Unpacked {
  static constexpr bool kEight = false;
  const uint8_t* at;
  inline Unpacked after(int64_t columns) const { return {at + columns * 16}; }
  inline I step(int pair, int half) const { return i_load(at + pair * 128 + half * 64); }
  STARLING_INLINE void prefetch(int) const {}
};

}  // namespace
