// The vector extensions of GCC and Clang, for any target, with SSE2 intrinsics where they matter.
#pragma once
#include <cmath>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));

constexpr int kLanes = 4;
constexpr int kDepth = 4;
constexpr int kKeys = 2;
constexpr int kPlanes = 4;
constexpr int64_t kTileBytes = 512 * 1024;
constexpr int kFloatRows = 2;
constexpr int kPrefetchBytes = 2048;
constexpr int kNearBytes = 0;  // one distance
constexpr int kPrefetchPositions = 24;
constexpr bool kPrefetchToL2 = false;  // no faster: it is bound by arithmetic, not by memory
constexpr bool kUnpack = true;

inline float float_of_half(uint16_t h) {
  uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
  float x;
  memcpy(&x, &bits, 4);
  x *= 0x1p112f;  // rebiases the exponent; exact for subnormals too
  memcpy(&bits, &x, 4);
  if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= (uint32_t)(h & 0x8000) << 16;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t half_of_float(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (bits < 0x38800000) {  // subnormal: the addition rounds to multiples of 2^-24
    float tiny;
    memcpy(&tiny, &bits, 4);
    tiny += 0.5f;
    memcpy(&bits, &tiny, 4);
    return (uint16_t)(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return (uint16_t)(sign | ((bits - 0x38000000) >> 13));
}

typedef float V __attribute__((vector_size(16)));
inline V v_zero() { return V{0, 0, 0, 0}; }
inline V v_set(float x) { return V{x, x, x, x}; }
inline V v_load(const float* p) {
  V x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline V v_load(const uint16_t* p) {
  return V{float_of_half(p[0]), float_of_half(p[1]), float_of_half(p[2]), float_of_half(p[3])};
}
inline void v_store(float* p, V x) { memcpy(p, &x, sizeof x); }
inline V v_fma(V a, V b, V c) { return a * b + c; }
inline V v_add(V a, V b) { return a + b; }
inline V v_sum_rows(const V* r) {
  V sums;
  for (int i = 0; i < 4; i++) sums[i] = (r[i][0] + r[i][1]) + (r[i][2] + r[i][3]);
  return sums;
}
inline void v_zip(V& a, V& b) {
  const V low = {a[0], b[0], a[1], b[1]};
  b = V{a[2], b[2], a[3], b[3]};
  a = low;
}
inline F f_fma(F a, F b, F c) { return a * b + c; }

inline F f_zero() { return F{}; }
inline F f_set(float x) { return F{} + x; }
inline F f_load(const float* p) {
  F x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void f_store(float* p, F x) { memcpy(p, &x, sizeof x); }
inline F f_load_half(const uint16_t* p) {
  F x;
  for (int i = 0; i < 16; i++) x[i] = float_of_half(p[i]);
  return x;
}
inline void f_store_half(uint16_t* p, F x) {
  for (int i = 0; i < 16; i++) p[i] = half_of_float(x[i]);
}
inline F f_add(F a, F b) { return a + b; }
inline F f_sub(F a, F b) { return a - b; }
inline F f_mul(F a, F b) { return a * b; }
inline F f_div(F a, F b) { return a / b; }
inline F f_choose(I mask, F a, F b) { return (F)((mask & (I)a) | (~mask & (I)b)); }
inline F f_max(F a, F b) { return f_choose(a > b, a, b); }
inline F f_min(F a, F b) { return f_choose(a < b, a, b); }
inline F f_abs(F a) { return (F)((I)a & 0x7fffffff); }
inline F f_zero_below(F x, float limit, F value) { return (F)((x >= f_set(limit)) & (I)value); }
inline float f_sum(F x) {
  float half[8];
  for (int i = 0; i < 8; i++) half[i] = x[i] + x[i + 8];
  return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}
inline float f_largest(F x) {
  float best = x[0];
  for (int i = 1; i < 16; i++) best = x[i] > best ? x[i] : best;
  return best;
}
inline F f_from(I x) { return __builtin_convertvector(x, F); }
inline I i_from(F x) {  // |x| < 2^22: adding 1.5 * 2^23 rounds to the nearest integer, ties to even
  return (I)(x + 12582912.0f) - 0x4b400000;
}
inline F f_bits(I x) { return (F)x; }

inline I i_zero() { return I{}; }
inline I i_set(int32_t x) { return I{} + x; }
inline I i_load(const void* p) {
  I x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void i_store(void* p, I x) { memcpy(p, &x, sizeof x); }
inline I i_add(I a, I b) { return a + b; }
inline I i_sub(I a, I b) { return a - b; }
inline I i_sub_bytes(I a, I b) {
  typedef uint8_t Bytes __attribute__((vector_size(64)));
  return (I)((Bytes)a - (Bytes)b);
}
inline I i_and(I a, I b) { return a & b; }
template <int n> inline I i_left(I a) { return (I)((U)a << n); }
template <int n> inline I i_right(I a) { return a >> n; }
inline I i_right_by(I a, int n) { return (I)((U)a >> n); }
inline int32_t i_sum(I x) {
  int32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += x[i];
  return sum;
}
inline void i_store_bytes(int8_t* p, I x) {
  for (int i = 0; i < 16; i++) p[i] = (int8_t)(x[i] > 127 ? 127 : x[i] < -128 ? -128 : x[i]);
}
inline I i_load_nibbles(const uint8_t* p) {
  I x;
  for (int i = 0; i < 16; i++) x[i] = (p[i / 2] >> (4 * (i % 2))) & 15;
  return x;
}
inline I i_times_int16(I a, int32_t low16) { return a * (int32_t)(int16_t)low16; }
inline I i_nibbles(I bytes, int half) {  // the low four bits of each byte, or the high ones
  return (half ? (I)((U)bytes >> 4) : bytes) & 0x0f0f0f0f;
}

}  // namespace

#include "weights.h"

namespace {

// sum += for each row, the products of its 4 bytes (unsigned) and the 4 bytes of `a` (signed).
inline I dot_four(I sum, I bytes, const int8_t* a) {
#if defined(__SSE2__)
  union { I i; __m128i q[4]; } acc = {sum}, w = {bytes};
  const __m128i zero = _mm_setzero_si128();
  const __m128i x = _mm_set_epi16(a[3], a[2], a[1], a[0], a[3], a[2], a[1], a[0]);
  for (int i = 0; i < 4; i++) {
    const __m128 low = _mm_castsi128_ps(_mm_madd_epi16(_mm_unpacklo_epi8(w.q[i], zero), x));
    const __m128 high = _mm_castsi128_ps(_mm_madd_epi16(_mm_unpackhi_epi8(w.q[i], zero), x));
    acc.q[i] = _mm_add_epi32(acc.q[i], _mm_castps_si128(_mm_shuffle_ps(low, high, 0x88)));
    acc.q[i] = _mm_add_epi32(acc.q[i], _mm_castps_si128(_mm_shuffle_ps(low, high, 0xdd)));
  }
  return acc.i;
#else
  for (int j = 0; j < 4; j++) sum += (I)(((U)bytes >> (8 * j)) & 255u) * (int32_t)a[j];
  return sum;
#endif
}
template <int P, class Weights>
STARLING_INLINE void dots(I* sums, const Weights& weights, const int8_t* a, int columns) {
  for (int pair = 0; pair < columns / 8; pair++) {
    weights.prefetch(pair);
    for (int half = 0; half < 2; half++) {
      const I step = weights.step(pair, half);
      for (int p = 0; p < P; p++) sums[p] = dot_four(sums[p], step, a + ((pair * 2 + half) * P + p) * 4);
    }
  }
}

}  // namespace
