// Uses each feature of the emulation once; tests/cuda/test_emulator.py says what must come out.
#include "device.h"

KERNEL(64) reverse(const float* x, float* y) {  // through shared memory, by a copy that must be waited for
  wait_for_previous_kernel();
  float* shared = (float*)shared_memory();
  const int i = threadIdx.x, row = blockIdx.x + gridDim.x * blockIdx.y;
  if (i < 16) copy_async(shared + 4 * i, x + 64 * row + 4 * i);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  y[64 * row + i] = shared[63 - i];
}

KERNEL(64) reverse_without_waiting(const float* x, float* y) {
  wait_for_previous_kernel();
  float* shared = (float*)shared_memory();
  const int i = threadIdx.x;
  if (i < 16) copy_async(shared + 4 * i, x + 4 * i);
  copy_async_commit();
  __syncthreads();
  y[i] = shared[63 - i];
}

KERNEL(64) reverse_without_barrier(const float* x, float* y) {
  wait_for_previous_kernel();
  float* shared = (float*)shared_memory();
  shared[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = shared[63 - threadIdx.x];
}

// A buffer is refilled while another warp may still read it.
KERNEL(64) refill_without_barrier(const float* x, float* y) {
  wait_for_previous_kernel();
  float* shared = (float*)shared_memory();
  const int i = threadIdx.x;
  if (i < 16) copy_async(shared + 4 * i, x + 4 * i);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  y[i] = shared[63 - i];
  if (i < 16) copy_async(shared + 4 * i, x + 4 * i);
  copy_async_commit();
  copy_async_wait<0>();
}

KERNEL(64) divergent() {
  wait_for_previous_kernel();
  if (threadIdx.x < 16) __syncthreads();
  else __syncwarp();
  __syncthreads();
}

// c [16][8] = a [16][16] * b [16][8]; b goes through ldmatrix, transposed.
KERNEL(32) product(const half_t* a, const half_t* b, float* c) {
  wait_for_previous_kernel();
  half_t* shared = (half_t*)shared_memory();
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 128; i += 32) shared[i] = b[i];
  __syncwarp();
  u32 right[4];
  load_matrices_transposed(right, shared + 8 * (lane % 16));
  const u32* rows = (const u32*)a;
  const u32 left[4] = {rows[g * 8 + t], rows[(g + 8) * 8 + t], rows[g * 8 + t + 4], rows[(g + 8) * 8 + t + 4]};
  const u32 column[2] = {right[0], right[1]};
  float sums[4] = {};
  mma_16x8x16(sums, left, column);
  for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// The last block to arrive adds what all have written, in order.
KERNEL(32) total(const float* x, float* parts, u32* counter, float* sum) {
  wait_for_previous_kernel();
  const float part = warp_sum(x[32 * blockIdx.x + threadIdx.x]);
  if (threadIdx.x == 0) parts[blockIdx.x] = part;
  if (!last_to_arrive(counter, gridDim.x, (int*)shared_memory())) return;
  if (threadIdx.x == 0) {
    float all = 0;
    for (u32 i = 0; i < gridDim.x; i++) all += parts[i];
    *sum = all;
  }
}

// One block writes each place once; two blocks both write it.
KERNEL(64) write_without_barrier(float* x, float* y) {
  wait_for_previous_kernel();
  x[(threadIdx.x + 32 * blockIdx.x) % 64] = 1;
  y[threadIdx.x] = 1;
}

KERNEL(64) read_without_barrier(float* x, float* y) {
  wait_for_previous_kernel();
  const int i = threadIdx.x + 64 * blockIdx.x;
  x[i] = 1;
  y[i] = x[i ^ 32];
}

// A copy reads while another warp may still write, with a barrier between the two and the copy's end.
KERNEL(64) copy_without_barrier(float* x, float* y) {
  wait_for_previous_kernel();
  float* shared = (float*)shared_memory();
  const int i = threadIdx.x;
  if (i < 8) copy_async(shared + 4 * i, x + 32 + 4 * i);
  copy_async_commit();
  if (i >= 32) x[i] = 1;
  __syncthreads();
  copy_async_wait<0>();
  y[i] = 0;
}

// last_to_arrive without the first fence, without the barrier, and without the second fence.
KERNEL(32) total_without(const float* x, float* parts, u32* counter, float* sum, int missing) {
  wait_for_previous_kernel();
  int* scratch = (int*)shared_memory();
  parts[32 * blockIdx.x + threadIdx.x] = x[32 * blockIdx.x + threadIdx.x];
  if (missing != 0) __threadfence();
  if (missing != 1) __syncthreads();
  if (threadIdx.x == 0) *scratch = atomicAdd(counter, 1u) == gridDim.x - 1;
  __syncthreads();
  if (missing != 2) __threadfence();
  if (missing != 3) __syncthreads();
  if (!*scratch) return;
  if (threadIdx.x == 0) *counter = 0;
  float all = 0;
  for (u32 i = 0; i < gridDim.x; i++) all += parts[32 * i + threadIdx.x];
  sum[threadIdx.x] = all;
}

// Words `stride` apart: an odd stride takes one pass, 2 takes two, 32 takes 32.
KERNEL(32) strided(float* y, int stride) {
  wait_for_previous_kernel();
  float* shared = (float*)shared_memory();
  shared[stride * threadIdx.x] = threadIdx.x;
  __syncwarp();
  y[32 * blockIdx.x + threadIdx.x] = shared[stride * (31 - threadIdx.x)];
}

// 16 bytes a lane: 8 lanes in a pass.
KERNEL(32) rows(float4* y) {
  wait_for_previous_kernel();
  float4* shared = (float4*)shared_memory();
  shared[threadIdx.x] = make_float4(0, 1, 2, threadIdx.x);
  __syncwarp();
  y[threadIdx.x] = shared[31 - threadIdx.x];
}

KERNEL(32) powers(const float* x, float* y) {
  wait_for_previous_kernel();
  y[threadIdx.x] = fast_exp2(x[threadIdx.x]);
}

// Warp 0 writes late what warp 1 reads early: without the barrier, that order is likely but not certain. Atomic
// instructions may meet without a fault.
KERNEL(64) overtake(u32* x, u32* y, int barrier) {
  wait_for_previous_kernel();
  const int i = threadIdx.x;
  x[i] = 1;
  __syncthreads();
  if (i < 32) {
    if (barrier) __syncthreads();
    for (int k = 0; k < 10; k++) __syncwarp();
    atomicAdd(x + i + 32, 1);
  } else {
    y[i - 32] = atomicAdd(x + i, 0);
    for (int k = 0; k < 2; k++) __syncwarp();
    y[i] = atomicAdd(x + i, 0);
    if (barrier) __syncthreads();
  }
}

KERNEL(32, 2) merge(const u32* x, u32* y) {
  wait_for_previous_kernel();
  y[threadIdx.x] = and_or(x[threadIdx.x], 0x000f000f, 0x64006400);
}

// What may be done before the previous kernel has run, and what may not.
KERNEL(32) scale(const float* x, const float* factors, float* y) {
  const float factor = factors[threadIdx.x];
  wait_for_previous_kernel();
  y[threadIdx.x] = factor * x[threadIdx.x];
}

KERNEL(32) scale_too_early(const float* x, const float* factors, float* y) {
  const float early = x[threadIdx.x];
  wait_for_previous_kernel();
  y[threadIdx.x] = factors[threadIdx.x] * early;
}

KERNEL(32) copy_too_early(const float* x, float* y) {
  float* shared = (float*)shared_memory();
  if (threadIdx.x < 8) copy_async(shared + 4 * threadIdx.x, x + 4 * threadIdx.x);
  copy_async_commit();
  wait_for_previous_kernel();
  copy_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}

KERNEL(64) scale_without_waiting(const float* x, const float* factors, float* y) {
  if (threadIdx.x >= 32) return;
  wait_for_previous_kernel();
  y[threadIdx.x] = factors[threadIdx.x] * x[threadIdx.x];
}

KERNEL(32) ask_ahead(const float* x, float* y) {
  if (threadIdx.x == 0) prefetch(x, 128);
  wait_for_previous_kernel();
  y[threadIdx.x] = 0;
}

// Some parameters of each kind, in an order that leaves a gap.
KERNEL(32) parameters(int* ints, int a, float* floats, float b, int c, float d, const float* e, float f, int g,
                      const float* null, int h) {
  wait_for_previous_kernel();
  const int all[] = {a, c, g, h, null == nullptr};
  const float others[] = {b, d, f, e[0]};
  if (threadIdx.x < 5) ints[threadIdx.x] = all[threadIdx.x];
  if (threadIdx.x < 4) floats[threadIdx.x] = others[threadIdx.x];
}
