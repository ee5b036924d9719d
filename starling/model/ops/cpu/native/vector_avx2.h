// 256-bit registers. Two registers hold the 16 output rows of a weight block.
#pragma once
#include <immintrin.h>

namespace {

struct F { __m256 a, b; };   // 16 floats
struct I { __m256i a, b; };  // 16 int32

constexpr int kLanes = 8;
constexpr int kDepth = 2;
constexpr int kKeys = 2;
#if defined(__AVXVNNI__)
constexpr int kPlanes = 6;  // twelve sums, to hide the latency of vpdpbusd, and three registers for their factors
#else
constexpr int kPlanes = 4;
#endif
constexpr int64_t kTileBytes = 512 * 1024;
constexpr int kFloatRows = 2;
constexpr int kPrefetchBytes = 8192;  // two distances, as in vector_avx512.h
constexpr int kNearBytes = 1024;
constexpr int kPrefetchPositions = 32;  // as in vector_avx512.h
constexpr bool kPrefetchToL2 = true;
constexpr bool kUnpack = true;

using V = __m256;
inline V v_zero() { return _mm256_setzero_ps(); }
inline V v_set(float x) { return _mm256_set1_ps(x); }
inline V v_load(const float* p) { return _mm256_loadu_ps(p); }
inline V v_load(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void v_store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V v_add(V a, V b) { return _mm256_add_ps(a, b); }
inline V v_sum_rows(const V* r) {
  V ab = _mm256_hadd_ps(r[0], r[1]), cd = _mm256_hadd_ps(r[2], r[3]);
  V ef = _mm256_hadd_ps(r[4], r[5]), gh = _mm256_hadd_ps(r[6], r[7]);
  V abcd = _mm256_hadd_ps(ab, cd), efgh = _mm256_hadd_ps(ef, gh);
  return _mm256_add_ps(_mm256_permute2f128_ps(abcd, efgh, 0x20), _mm256_permute2f128_ps(abcd, efgh, 0x31));
}
inline void v_zip(V& a, V& b) {
  const V low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
  a = _mm256_permute2f128_ps(low, high, 0x20);
  b = _mm256_permute2f128_ps(low, high, 0x31);
}

inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline F f_load_half(const uint16_t* p) { return {v_load(p), v_load(p + 8)}; }
inline void f_store_half(uint16_t* p, F x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F f_add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F f_sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F f_mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F f_div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F f_max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F f_min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F f_abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F f_zero_below(F x, float limit, F value) {
  const __m256 l = _mm256_set1_ps(limit);
  return {_mm256_and_ps(_mm256_cmp_ps(x.a, l, _CMP_GE_OQ), value.a),
          _mm256_and_ps(_mm256_cmp_ps(x.b, l, _CMP_GE_OQ), value.b)};
}
inline float f_sum(F x) {
  __m256 s = _mm256_add_ps(x.a, x.b);
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline float f_largest(F x) {
  __m256 s = _mm256_max_ps(x.a, x.b);
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
inline F f_from(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I i_from(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F f_bits(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

inline I i_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I i_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I i_load(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline void i_store(void* p, I x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
inline I i_add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I i_sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I i_and(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int n> inline I i_left(I x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
template <int n> inline I i_right(I x) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
inline I i_right_by(I x, int n) {
  __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_srl_epi32(x.a, count), _mm256_srl_epi32(x.b, count)};
}
inline int32_t i_sum(I x) {
  __m256i s = _mm256_add_epi32(x.a, x.b);
  __m128i h = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
}
inline void i_store_bytes(int8_t* p, I x) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline I i_widen(__m128i bytes) {
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
inline I i_load_nibbles(const uint8_t* p) {
  __m128i bytes = _mm_loadl_epi64((const __m128i*)p), mask = _mm_set1_epi8(15);
  __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  return i_widen(_mm_unpacklo_epi8(low, high));
}
inline I i_times_int16(I x, int32_t low16) {
  const __m256i y = _mm256_set1_epi32(low16);
  return {_mm256_madd_epi16(x.a, y), _mm256_madd_epi16(x.b, y)};
}
inline I i_nibbles(I bytes, int half) {  // the low four bits of each byte, or the high ones
  const I mask = {_mm256_set1_epi8(15), _mm256_set1_epi8(15)};
  return i_and(half ? I{_mm256_srli_epi16(bytes.a, 4), _mm256_srli_epi16(bytes.b, 4)} : bytes, mask);
}

}  // namespace

#include "weights.h"

namespace {

inline __m256i four_columns(const int8_t* a) {
  int32_t word;
  memcpy(&word, a, 4);
  return _mm256_set1_epi32(word);
}

#if defined(__AVXVNNI__)
template <int P, class Weights>
STARLING_INLINE void dots(I* sums, const Weights& weights, const int8_t* a, int columns) {
  for (int span = 0; span < columns / 32; span++) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      weights.prefetch(span * 4 + i);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const I step = weights.step(span * 4 + i, half);
#pragma GCC unroll 6
        for (int p = 0; p < P; p++) {
          __m256i x = four_columns(a + ((span * 8 + i * 2 + half) * P + p) * 4);
          sums[p].a = _mm256_dpbusd_avx_epi32(sums[p].a, step.a, x);
          sums[p].b = _mm256_dpbusd_avx_epi32(sums[p].b, step.b, x);
        }
        STARLING_COMPILER_BARRIER;
      }
    }
  }
}
#else
template <int P, class Weights>
STARLING_INLINE void dots(I* sums, const Weights& weights, const int8_t* a, int columns) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int span = 0; span < columns / 32; span++) {  // 8 products of at most 2 * 15 * 128 fit int16
    I low[P];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      weights.prefetch(span * 4 + i);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const I step = weights.step(span * 4 + i, half);
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
          __m256i x = four_columns(a + ((span * 8 + i * 2 + half) * P + p) * 4);
          I product = {_mm256_maddubs_epi16(step.a, x), _mm256_maddubs_epi16(step.b, x)};
          const bool begin = i == 0 && half == 0;
          low[p].a = begin ? product.a : _mm256_add_epi16(low[p].a, product.a);
          low[p].b = begin ? product.b : _mm256_add_epi16(low[p].b, product.b);
          STARLING_IN_REGISTER(low[p].a);
          STARLING_IN_REGISTER(low[p].b);
        }
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; p++)
      sums[p] = i_add(sums[p], {_mm256_madd_epi16(low[p].a, ones), _mm256_madd_epi16(low[p].b, ones)});
  }
}

// Two products of 8-bit weights overflow vpmaddubsw's int16, so nibbles are summed separately: w = 16 * high + low.
template <int P>
STARLING_INLINE void dots(I* sums, const EightBits& weights, const int8_t* a, int columns) {
  const __m256i ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16), mask = _mm256_set1_epi8(15);
  for (int p = 0; p < P; p++) {
    for (int span = 0; span < columns / 32; span++) {
      I low = i_zero(), high = i_zero();
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        if (p == 0) weights.prefetch(span * 4 + i);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
          const I step = weights.step(span * 4 + i, half);
          __m256i x = four_columns(a + ((span * 8 + i * 2 + half) * P + p) * 4);
          I top = {_mm256_srli_epi16(step.a, 4), _mm256_srli_epi16(step.b, 4)};
          low.a = _mm256_add_epi16(low.a, _mm256_maddubs_epi16(_mm256_and_si256(step.a, mask), x));
          low.b = _mm256_add_epi16(low.b, _mm256_maddubs_epi16(_mm256_and_si256(step.b, mask), x));
          high.a = _mm256_add_epi16(high.a, _mm256_maddubs_epi16(_mm256_and_si256(top.a, mask), x));
          high.b = _mm256_add_epi16(high.b, _mm256_maddubs_epi16(_mm256_and_si256(top.b, mask), x));
        }
      }
      sums[p] = i_add(sums[p], {_mm256_madd_epi16(low.a, ones), _mm256_madd_epi16(low.b, ones)});
      sums[p] = i_add(sums[p], {_mm256_madd_epi16(high.a, sixteens), _mm256_madd_epi16(high.b, sixteens)});
    }
  }
}
#endif

}  // namespace
