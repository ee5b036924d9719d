// RMSNorm of float32 rows by 256 threads, and SiLU: the same arithmetic in separate kernels and fused around a linear.
#ifndef STARLING_NORM_H
#define STARLING_NORM_H

#include "device.h"

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / 32;

// This warp's part of the sum of squares of row [width], width a multiple of 4; the same in every lane.
DEVICE float norm_partial(const float* row, int width) {
  float sum = 0;
  for (int i = 4 * threadIdx.x; i < width; i += 4 * kNormThreads) {
    const float4 x = *(const float4*)(row + i);
    sum = fmaf(x.x, x.x, sum), sum = fmaf(x.y, x.y, sum), sum = fmaf(x.z, x.z, sum), sum = fmaf(x.w, x.w, sum);
  }
  return warp_sum(sum);
}

// 1 / sqrt(mean square + eps), from all warps' parts.
DEVICE float norm_scale(const float* partials, int width, float eps) {
  float sum = 0;
  for (int warp = 0; warp < kNormWarps; warp++) sum += partials[warp];
  return rsqrtf(sum / width + eps);
}

// Hugging Face's order: normalised in float32, rounded to fp16, multiplied by the weight in fp16. Four elements.
DEVICE uint2 normalized(float4 x, float scale, uint2 weight) {
  return make_uint2(half2_mul(pack_halves(x.x * scale, x.y * scale), weight.x),
                    half2_mul(pack_halves(x.z * scale, x.w * scale), weight.y));
}

DEVICE float silu(float x) { return x / (1.0f + __expf(-x)); }

#endif
