// 128-bit registers of aarch64. Four registers hold the 16 output rows of a weight block.
#pragma once
#include <arm_neon.h>

namespace {

struct F { float32x4_t q[4]; };  // 16 floats
struct I { int32x4_t q[4]; };    // 16 int32

constexpr int kLanes = 4;
constexpr int kDepth = 4;
constexpr int kKeys = 4;
constexpr int kPlanes = 4;
constexpr int64_t kTileBytes = 512 * 1024;
constexpr int kFloatRows = 2;
constexpr int kPrefetchBytes = 2048;
constexpr int kNearBytes = 0;  // one distance
constexpr int kPrefetchPositions = 24;
constexpr bool kPrefetchToL2 = false;  // not measured here
constexpr bool kUnpack = true;

using V = float32x4_t;
inline V v_zero() { return vdupq_n_f32(0); }
inline V v_set(float x) { return vdupq_n_f32(x); }
inline V v_load(const float* p) { return vld1q_f32(p); }
inline V v_load(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void v_store(float* p, V x) { vst1q_f32(p, x); }
inline V v_fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V v_add(V a, V b) { return vaddq_f32(a, b); }
inline V v_sum_rows(const V* r) { return vpaddq_f32(vpaddq_f32(r[0], r[1]), vpaddq_f32(r[2], r[3])); }
inline void v_zip(V& a, V& b) {
  const V low = vzip1q_f32(a, b);
  b = vzip2q_f32(a, b);
  a = low;
}

// Applies `op` to each quarter.
template <class Op> STARLING_INLINE F floats(const Op& op) { return {{op(0), op(1), op(2), op(3)}}; }
template <class Op> STARLING_INLINE I ints(const Op& op) { return {{op(0), op(1), op(2), op(3)}}; }

inline F f_set(float x) { return floats([&](int) { return vdupq_n_f32(x); }); }
inline F f_zero() { return f_set(0); }
inline F f_load(const float* p) { return floats([&](int i) { return vld1q_f32(p + i * 4); }); }
inline F f_load_half(const uint16_t* p) { return floats([&](int i) { return v_load(p + i * 4); }); }
inline void f_store(float* p, F x) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + i * 4, x.q[i]);
}
inline void f_store_half(uint16_t* p, F x) {
  for (int i = 0; i < 4; i++) vst1_u16(p + i * 4, vreinterpret_u16_f16(vcvt_f16_f32(x.q[i])));
}
inline F f_add(F x, F y) { return floats([&](int i) { return vaddq_f32(x.q[i], y.q[i]); }); }
inline F f_sub(F x, F y) { return floats([&](int i) { return vsubq_f32(x.q[i], y.q[i]); }); }
inline F f_mul(F x, F y) { return floats([&](int i) { return vmulq_f32(x.q[i], y.q[i]); }); }
inline F f_div(F x, F y) { return floats([&](int i) { return vdivq_f32(x.q[i], y.q[i]); }); }
inline F f_max(F x, F y) {  // y if either is NaN, as on x86
  return floats([&](int i) { return vbslq_f32(vcgtq_f32(x.q[i], y.q[i]), x.q[i], y.q[i]); });
}
inline F f_min(F x, F y) {
  return floats([&](int i) { return vbslq_f32(vcltq_f32(x.q[i], y.q[i]), x.q[i], y.q[i]); });
}
inline F f_abs(F x) { return floats([&](int i) { return vabsq_f32(x.q[i]); }); }
inline F f_fma(F x, F y, F z) { return floats([&](int i) { return vfmaq_f32(z.q[i], x.q[i], y.q[i]); }); }
inline F f_zero_below(F x, float limit, F value) {
  const float32x4_t l = vdupq_n_f32(limit);
  return floats([&](int i) {
    return vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(x.q[i], l), vreinterpretq_u32_f32(value.q[i])));
  });
}
inline float f_sum(F x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.q[0], x.q[1]), vaddq_f32(x.q[2], x.q[3]))); }
inline float f_largest(F x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.q[0], x.q[1]), vmaxq_f32(x.q[2], x.q[3]))); }
inline F f_from(I x) { return floats([&](int i) { return vcvtq_f32_s32(x.q[i]); }); }
inline I i_from(F x) { return ints([&](int i) { return vcvtnq_s32_f32(x.q[i]); }); }
inline F f_bits(I x) { return floats([&](int i) { return vreinterpretq_f32_s32(x.q[i]); }); }

inline I i_set(int32_t x) { return ints([&](int) { return vdupq_n_s32(x); }); }
inline I i_zero() { return i_set(0); }
inline I i_load(const void* p) {
  return ints([&](int i) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p + i * 16)); });
}
inline void i_store(void* p, I x) {
  for (int i = 0; i < 4; i++) vst1q_u8((uint8_t*)p + i * 16, vreinterpretq_u8_s32(x.q[i]));
}
inline I i_add(I x, I y) { return ints([&](int i) { return vaddq_s32(x.q[i], y.q[i]); }); }
inline I i_sub(I x, I y) { return ints([&](int i) { return vsubq_s32(x.q[i], y.q[i]); }); }
inline I i_sub_bytes(I x, I y) {
  return ints([&](int i) {
    return vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_s32(x.q[i]), vreinterpretq_s8_s32(y.q[i])));
  });
}
inline I i_and(I x, I y) { return ints([&](int i) { return vandq_s32(x.q[i], y.q[i]); }); }
template <int n> inline I i_left(I x) { return ints([&](int i) { return vshlq_n_s32(x.q[i], n); }); }
template <int n> inline I i_right(I x) { return ints([&](int i) { return vshrq_n_s32(x.q[i], n); }); }
inline I i_right_by(I x, int n) {
  const int32x4_t by = vdupq_n_s32(-n);
  return ints([&](int i) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x.q[i]), by)); });
}
inline int32_t i_sum(I x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.q[0], x.q[1]), vaddq_s32(x.q[2], x.q[3]))); }
inline void i_store_bytes(int8_t* p, I x) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(x.q[0]), vqmovn_s32(x.q[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(x.q[2]), vqmovn_s32(x.q[3]));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
inline I i_widen(uint8x16_t bytes) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))}};
}
inline I i_load_nibbles(const uint8_t* p) {
  const uint8x8_t bytes = vld1_u8(p), low = vand_u8(bytes, vdup_n_u8(15)), high = vshr_n_u8(bytes, 4);
  return i_widen(vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high)));
}
inline I i_times_int16(I x, int32_t low16) {
  return ints([&](int i) { return vmulq_n_s32(x.q[i], (int16_t)low16); });
}
inline I i_nibbles(I x, int half) {  // the low four bits of each byte, or the high ones
  return ints([&](int i) {
    const uint8x16_t bytes = vreinterpretq_u8_s32(x.q[i]);
    return vreinterpretq_s32_u8(half ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15)));
  });
}

}  // namespace

#include "weights.h"

namespace {

template <int i> struct Index { static constexpr int value = i; };
template <int N, int i = 0, class Body> STARLING_INLINE void unrolled(const Body& body) {
  if constexpr (i < N) {
    body(Index<i>{});
    unrolled<N, i + 1>(body);
  }
}

// sum[row] += the products of the row's 4 bytes and those in one lane of x, all signed.
template <int lane> STARLING_INLINE int32x4_t dot_lane(int32x4_t sum, int8x16_t rows, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_laneq_s32(sum, rows, x, lane);
#else
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), lane));
  const int16x8_t low = vmull_s8(vget_low_s8(rows), vget_low_s8(four)), high = vmull_high_s8(rows, four);
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

// sums[p][row] += sum over k of weight[row][k] * a[k / 4][p][k % 4], k in [0, columns); columns is a multiple of 32.
// Bytes are multiplied as signed: 8-bit weights enter as w - 128, and 128 times the sum of a is added back.
template <int P, class Weights>
STARLING_INLINE void dots(I* sums, const Weights& weights, const int8_t* a, int columns) {
  const int8x16_t ones = vdupq_n_s8(1);
  int32x4_t a_sums[P];
  for (int p = 0; p < P; p++) a_sums[p] = vdupq_n_s32(0);
  for (int span = 0; span < columns / 32; span++, a += 32 * P) {
    int8x16_t x;
    unrolled<8>([&](auto s) {
      if constexpr (s.value % 2 == 0) weights.prefetch(span * 4 + s.value / 2);
      I step = weights.step(span * 4 + s.value / 2, s.value % 2);
      if constexpr (Weights::kEight) step = ints([&](int i) { return veorq_s32(step.q[i], vdupq_n_s32(0x80808080)); });
      unrolled<P>([&](auto p) {
        constexpr int word = s.value * P + p.value;  // of the span's activations
        if constexpr (word % 4 == 0) x = vld1q_s8(a + word * 4);
        sums[p.value] = ints([&](int i) {
          return dot_lane<word % 4>(sums[p.value].q[i], vreinterpretq_s8_s32(step.q[i]), x);
        });
        if constexpr (Weights::kEight) a_sums[p.value] = dot_lane<word % 4>(a_sums[p.value], ones, x);
      });
    });
  }
  if constexpr (Weights::kEight)
    for (int p = 0; p < P; p++)
      sums[p] = ints([&](int i) { return vaddq_s32(sums[p].q[i], vshlq_n_s32(a_sums[p], 7)); });
}

}  // namespace
