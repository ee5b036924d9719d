// What threads do together, made of what device.h offers: part of it, and of tests/cuda/emulated_device.h.
#ifndef STARLING_COLLECTIVES_H
#define STARLING_COLLECTIVES_H

DEVICE float warp_sum(float x) {  // the same in every lane, and added in the same order
#pragma unroll
  for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
  for (int lane = 16; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

// True in the last of `blocks` blocks to call it with this counter, which must be 0 before and is 0 again after. What
// the others wrote to global memory before is visible then. Every thread of the block calls it; `scratch` is an int of
// shared memory.
DEVICE bool last_to_arrive(u32* counter, u32 blocks, int* scratch) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = atomicAdd(counter, 1u) == blocks - 1;
    if (last) *counter = 0;
    *scratch = last;
  }
  __syncthreads();
  const bool last = *scratch != 0;
  __threadfence();
  __syncthreads();
  return last;
}

#endif
