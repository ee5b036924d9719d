// How products read a block's weights: where they lie, and what to ask memory for meanwhile. The vector headers include
// it, whose registers and constants it uses.
#pragma once

namespace {

// Of the weights ahead, one line; and, where two distances are used, of those near from the second-level cache.
STARLING_INLINE void ask_for(const uint8_t* ahead, const uint8_t* at) {
  if constexpr (kNearBytes > 0) {
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(at + kNearBytes, 0, 3);
  } else {
    __builtin_prefetch(ahead, 0, 3);
  }
}

struct Nibbles {  // 64 bytes: 16 rows x 8 columns of 4 bits
  static constexpr bool kEight = false;
  static constexpr int kColumnBytes = 8, kAheadBytes = 8;  // of `at` and of `ahead` for each column
  const uint8_t* at;
  const uint8_t* ahead;  // what to ask for while `at` is read
  inline I step(int pair, int half) const { return i_nibbles(i_load(at + pair * 64), half); }
  STARLING_INLINE void prefetch(int pair) const { ask_for(ahead + pair * 64, at + pair * 64); }
};
struct Bytes {  // 64 bytes: 16 rows x 4 columns of 8 bits, of which nibbles unpacked to L1 use 4
  static constexpr bool kEight = false;
  static constexpr int kColumnBytes = 16, kAheadBytes = 8;
  const uint8_t* at;
  const uint8_t* ahead;
  inline I step(int pair, int half) const { return i_load(at + pair * 128 + half * 64); }
  STARLING_INLINE void prefetch(int pair) const {
    if constexpr (kAskUnpacked) __builtin_prefetch(ahead + pair * 64, 0, 2);
  }
};
struct EightBits : Bytes {
  static constexpr bool kEight = true;
  static constexpr int kAheadBytes = 16;
  STARLING_INLINE void prefetch(int pair) const {
    if constexpr (kNearBytes > 0) {
#pragma GCC unroll 2
      for (int line = 0; line < 128; line += 64) ask_for(ahead + pair * 128 + line, at + pair * 128 + line);
    }
  }
};

}  // namespace
