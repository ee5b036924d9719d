// The embedding, the activation between gate|up and down, and the choice of the last layer's tokens that go on.
#include "device.h"

// table fp16 [V][hidden] at ids [tokens] → out float32 [tokens][hidden], hidden a multiple of 4. An id below 0 is
// -(1 + row) of `sampled`, the previous step's draws, which the host need not know yet.
KERNEL(256) embed(const int* ids, const int* sampled, const half_t* table, float* out, int hidden) {
  wait_for_previous_kernel();
  const int id = ids[blockIdx.x] >= 0 ? ids[blockIdx.x] : sampled[-1 - ids[blockIdx.x]];
  for (int i = 4 * threadIdx.x; i < hidden; i += 4 * blockDim.x) {
    const uint2 x = *(const uint2*)(table + (i64)id * hidden + i);
    float4* const to = (float4*)(out + (i64)blockIdx.x * hidden + i);
    *to = make_float4(low_half(x.x), high_half(x.x), low_half(x.y), high_half(x.y));
  }
}

// Copies rows `rows` [blocks] of attended fp16 [tokens][width] and of residual float32 [tokens][hidden]; width is a
// multiple of 8, hidden one of 4.
KERNEL(256) pick(const int* rows, const half_t* attended, const float* residual, half_t* picked, float* kept, int width,
                 int hidden) {
  wait_for_previous_kernel();
  const i64 from = rows[blockIdx.x], to = blockIdx.x;
  for (int i = threadIdx.x; i < width / 8; i += blockDim.x)
    ((uint4*)(picked + to * width))[i] = ((const uint4*)(attended + from * width))[i];
  for (int i = threadIdx.x; i < hidden / 4; i += blockDim.x)
    ((float4*)(kept + to * hidden))[i] = ((const float4*)(residual + from * hidden))[i];
}

// gate_up fp16 [tokens][2][width] → silu(gate) * up, fp16 [tokens][width]; eight elements a thread, rounded once.
KERNEL(256) silu_and_mul(const half_t* gate_up, half_t* out, int tokens, int width) {
  wait_for_previous_kernel();
  const int index = blockIdx.x * blockDim.x + threadIdx.x, pieces = width / 8, token = index / pieces;
  if (token >= tokens) return;
  const half_t* from = gate_up + (i64)token * 2 * width + index % pieces * 8;
  const uint4 gate = *(const uint4*)from, up = *(const uint4*)(from + width);
  const u32 gates[4] = {gate.x, gate.y, gate.z, gate.w}, ups[4] = {up.x, up.y, up.z, up.w};
  u32 y[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float a = low_half(gates[i]), b = high_half(gates[i]);
    y[i] = pack_halves(a / (1 + __expf(-a)) * low_half(ups[i]), b / (1 + __expf(-b)) * high_half(ups[i]));
  }
  *(uint4*)(out + (i64)index * 8) = make_uint4(y[0], y[1], y[2], y[3]);
}
