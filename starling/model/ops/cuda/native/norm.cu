// RMSNorm, alone and after an addition. A block takes one token; widths are multiples of 4.
#include "norm.h"

DEVICE void norm_row(const float* x, const half_t* weight, half_t* out, int width, float eps) {
  float* partials = (float*)shared_memory();
  const float partial = norm_partial(x, width);
  if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32] = partial;
  __syncthreads();
  const float scale = norm_scale(partials, width, eps);
  for (int i = 4 * threadIdx.x; i < width; i += 4 * kNormThreads)
    *(uint2*)(out + i) = normalized(*(const float4*)(x + i), scale, *(const uint2*)(weight + i));
}

// x float32 [tokens][width], weight fp16 [width] → out fp16 [tokens][width]
KERNEL(256) rms_norm(const float* x, const half_t* weight, half_t* out, int width, float eps) {
  wait_for_previous_kernel();
  const i64 row = (i64)blockIdx.x * width;
  norm_row(x + row, weight, out + row, width, eps);
}

// residual float32 [tokens][width] += x fp16 [tokens][width], then its norm → out fp16 [tokens][width]
KERNEL(256) add_rms_norm(const half_t* x, float* residual, const half_t* weight, half_t* out, int width, float eps) {
  wait_for_previous_kernel();
  const i64 row = (i64)blockIdx.x * width;
  for (int i = 4 * threadIdx.x; i < width; i += 4 * kNormThreads) {  // each thread reads back only what it wrote
    const uint2 added = *(const uint2*)(x + row + i);
    float4* const at = (float4*)(residual + row + i);
    const float4 sum = *at;
    *at = make_float4(sum.x + low_half(added.x), sum.y + high_half(added.x), sum.z + low_half(added.y),
                      sum.w + high_half(added.y));
  }
  norm_row(residual + row, weight, out + row, width, eps);
}
