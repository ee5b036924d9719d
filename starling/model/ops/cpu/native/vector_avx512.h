// 512-bit registers. One register holds the 16 output rows of a weight block.
#pragma once
#include <immintrin.h>

namespace {

using F = __m512;   // 16 floats
using I = __m512i;  // 16 int32

constexpr int kLanes = 16;      // floats in one machine register
constexpr int kDepth = 4;       // registers of head_dim that attention sums at once
constexpr int kKeys = 4;        // registers of keys, one position per lane, that a prompt's attention takes at once
constexpr int kFloatRows = 4;   // activation rows in one tile of the float32 kernel
constexpr int64_t kTileBytes = 1024 * 1024;  // activations that stay in L2 while blocks of weights stream past
// How far ahead of its use a weight is prefetched, into L2 first and then from there into L1: measured 5% faster than
// either alone.
constexpr int kPrefetchBytes = 8192;
constexpr int kNearBytes = 1024;
// How many positions ahead of its use attention prefetches a key or value, and whether into L2, which can have more
// misses outstanding than L1: a layer at 4,096 positions took 0.70 ms instead of 0.95 (Zen 4).
constexpr int kPrefetchPositions = 32;
constexpr bool kPrefetchToL2 = true;
// int8 activation planes in one tile, and whether the first of a block's tiles unpacks its weights for the others. With
// VNNI, unpacking overlaps with the products and takes no time of its own, and they leave registers for 16 planes; with
// AMX, steps of more than 8 are left to it.
#if defined(__AVX512VNNI__)
#if defined(__AMX_INT8__)
constexpr int kPlanes = 8;
#else
constexpr int kPlanes = 16;
#endif
constexpr bool kUnpack = false;
#else
constexpr int kPlanes = 8;
constexpr bool kUnpack = true;
#endif

using V = __m512;  // one machine register of floats, for attention
inline V v_zero() { return _mm512_setzero_ps(); }
inline V v_set(float x) { return _mm512_set1_ps(x); }
inline V v_load(const float* p) { return _mm512_loadu_ps(p); }
inline V v_load(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void v_store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V v_add(V a, V b) { return _mm512_add_ps(a, b); }

// Lane i of the result is the sum of the lanes of rows[i]: neighbours are added, then neighbouring sums, and so on.
inline V v_sum_rows(const V* rows) {
  V pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; i++) {
    const V a = rows[2 * i], b = rows[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  }
  for (int i = 0; i < 4; i++) {  // each 128 bits: a part of four rows
    const V a = pairs[2 * i], b = pairs[2 * i + 1];
    fours[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  }
  for (int i = 0; i < 2; i++) {
    const V a = fours[2 * i], b = fours[2 * i + 1];
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                       _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}
inline void v_zip(V& a, V& b) {  // a, b = the first and the second half of (a0, b0, a1, b1, ...)
  const I low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const V first = _mm512_permutex2var_ps(a, low, b);
  b = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
  a = first;
}

inline F f_zero() { return _mm512_setzero_ps(); }
inline F f_set(float x) { return _mm512_set1_ps(x); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F f_load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void f_store_half(uint16_t* p, F x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }
inline F f_min(F a, F b) { return _mm512_min_ps(a, b); }
inline F f_abs(F a) { return _mm512_abs_ps(a); }
inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F f_zero_below(F x, float limit, F value) {  // value where x >= limit, else 0
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_GE_OQ), value);
}
inline float f_sum(F x) { return _mm512_reduce_add_ps(x); }
inline float f_largest(F x) { return _mm512_reduce_max_ps(x); }
inline F f_from(I x) { return _mm512_cvtepi32_ps(x); }
inline I i_from(F x) { return _mm512_cvtps_epi32(x); }
inline F f_bits(I x) { return _mm512_castsi512_ps(x); }

inline I i_zero() { return _mm512_setzero_si512(); }
inline I i_set(int32_t x) { return _mm512_set1_epi32(x); }
inline I i_load(const void* p) { return _mm512_loadu_si512(p); }
inline void i_store(void* p, I x) { _mm512_storeu_si512(p, x); }
inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I i_sub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I i_sub_bytes(I a, I b) { return _mm512_sub_epi8(a, b); }
inline I i_and(I a, I b) { return _mm512_and_si512(a, b); }
template <int n> inline I i_left(I a) { return _mm512_slli_epi32(a, n); }
template <int n> inline I i_right(I a) { return _mm512_srai_epi32(a, n); }
inline I i_right_by(I a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
inline int32_t i_sum(I x) { return _mm512_reduce_add_epi32(x); }
inline void i_store_bytes(int8_t* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(x)); }
inline I i_load_nibbles(const uint8_t* p) {  // 8 bytes: row 2i in the low half of byte i, row 2i + 1 in the high half
  __m128i bytes = _mm_loadl_epi64((const __m128i*)p), mask = _mm_set1_epi8(15);
  __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  return _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
}
// a (0 to 255) times the int16 in the low half of `low16`, whose high half is 0.
inline I i_times_int16(I a, int32_t low16) { return _mm512_madd_epi16(a, _mm512_set1_epi32(low16)); }
inline I i_nibbles(I bytes, int half) {  // the low four bits of each byte, or the high ones
  return i_and(half ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
}

}  // namespace

#include "weights.h"

namespace {

inline I four_columns(const int8_t* a) {
  int32_t word;
  memcpy(&word, a, 4);
  return _mm512_set1_epi32(word);
}

// sums[p][row] += sum over k of weight[row][k] * a[k / 4][p][k % 4], k in [0, columns); columns is a multiple of 32.
#if defined(__AVX512VNNI__)
template <int P, class Weights>
STARLING_INLINE void dots(I* sums, const Weights& weights, const int8_t* a, int columns) {
  constexpr int kChains = P <= 2 ? 4 : P <= 4 ? 2 : 1;  // enough sums to hide the latency of vpdpbusd
  I chains[kChains][P];
  for (int c = 0; c < kChains; c++)
    for (int p = 0; p < P; p++) chains[c][p] = c ? i_zero() : sums[p];
  for (int span = 0; span < columns / 32; span++) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      weights.prefetch(span * 4 + i);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const I step = weights.step(span * 4 + i, half);
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) {
          I& sum = chains[(i * 2 + half) % kChains][p];
          sum = _mm512_dpbusd_epi32(sum, step, four_columns(a + ((span * 8 + i * 2 + half) * P + p) * 4));
        }
      }
    }
  }
  for (int p = 0; p < P; p++) {
    for (int c = 1; c < kChains; c++) chains[0][p] = i_add(chains[0][p], chains[c][p]);
    sums[p] = chains[0][p];
  }
}
#else
template <int P, class Weights>
STARLING_INLINE void dots(I* sums, const Weights& weights, const int8_t* a, int columns) {
  const I ones = _mm512_set1_epi16(1), sixteens = _mm512_set1_epi16(16), mask = _mm512_set1_epi8(15);
  for (int span = 0; span < columns / 32; span++) {  // 8 products of at most 2 * 15 * 128 fit int16
    I low[P], high[Weights::kEight ? P : 1];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      weights.prefetch(span * 4 + i);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const I step = weights.step(span * 4 + i, half);
        const bool begin = i == 0 && half == 0;
        I w = Weights::kEight ? _mm512_and_si512(step, mask) : step;
        I top = Weights::kEight ? _mm512_and_si512(_mm512_srli_epi16(step, 4), mask) : w;
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
          I x = four_columns(a + ((span * 8 + i * 2 + half) * P + p) * 4);
          I product = _mm512_maddubs_epi16(w, x);
          low[p] = begin ? product : _mm512_add_epi16(low[p], product);
          STARLING_IN_REGISTER(low[p]);
          if (Weights::kEight) {
            product = _mm512_maddubs_epi16(top, x);
            high[p] = begin ? product : _mm512_add_epi16(high[p], product);
            STARLING_IN_REGISTER(high[p]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
      sums[p] = i_add(sums[p], _mm512_madd_epi16(low[p], ones));
      if (Weights::kEight) sums[p] = i_add(sums[p], _mm512_madd_epi16(high[p], sixteens));
    }
  }
}
#endif

}  // namespace
