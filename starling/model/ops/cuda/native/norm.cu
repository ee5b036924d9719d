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
  const i64 row = (i64)blockIdx.x * width;
  norm_row(x + row, weight, out + row, width, eps);
}

// residual float32 [tokens][width] += x fp16 [tokens][width], then its norm → out fp16 [tokens][width]
KERNEL(256) add_rms_norm(const half_t* x, float* residual, const half_t* weight, half_t* out, int width, float eps) {
  const i64 row = (i64)blockIdx.x * width;
  for (int i = 4 * threadIdx.x; i < width; i += 4 * kNormThreads) {  // each thread reads back only what it wrote
    const uint2 added = *(const uint2*)(x + row + i);
    float4* sum = (float4*)(residual + row + i);
    *sum = make_float4(sum->x + low_half(added.x), sum->y + high_half(added.x), sum->z + low_half(added.y),
                       sum->w + high_half(added.y));
  }
  norm_row(residual + row, weight, out + row, width, eps);
}

// gate_up fp16 [tokens][2 * width] → silu(first half) * second half, fp16 [tokens][width]; 4 of them for each thread
KERNEL(256) silu_and_mul(const half_t* gate_up, half_t* out, int width) {
  const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= width) return;
  const half_t* row = gate_up + (i64)blockIdx.y * 2 * width + i;
  const uint2 gate = *(const uint2*)row, up = *(const uint2*)(row + width);
  *(uint2*)(out + (i64)blockIdx.y * width + i) = make_uint2(
      pack_halves(silu(low_half(gate.x)) * low_half(up.x), silu(high_half(gate.x)) * high_half(up.x)),
      pack_halves(silu(low_half(gate.y)) * low_half(up.y), silu(high_half(gate.y)) * high_half(up.y)));
}
