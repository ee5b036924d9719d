// What the kernels use of the device beyond plain CUDA C++: fp16 as bits, tensor cores, asynchronous copies.
//
// It includes no header, so that NVRTC compiles the kernels without CUDA's. Kernels follow these rules, on which the
// tests' emulated device and DriverModule rely:
//   blocks have one dimension of threads, a multiple of 32, and every thread of a warp reaches each warp operation;
//   all shared memory is dynamic, from shared_memory();
//   parameters are pointers, int and float;
//   no block waits for another (the last to arrive at a counter may do what remains);
//   every thread calls wait_for_previous_kernel(), and before that only requests weights, by asynchronous copies: only
//   the kernels that packed them write them, and another kernel or a copy (a step's inputs) comes in between.
#ifndef STARLING_DEVICE_H
#define STARLING_DEVICE_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef u16 half_t;  // the bits of an fp16 number; two of them in a u32, the first in the low half

// KERNEL(threads), or KERNEL(threads, blocks): registers must allow that many blocks on a multiprocessor.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define DEVICE static __device__ __forceinline__

DEVICE u8* shared_memory() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return (u8*)dynamic_shared_memory;
}

// -- fp16 ---------------------------------------------------------------------------------------------------------

DEVICE float half_to_float(half_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

DEVICE half_t float_to_half(float x) {  // to nearest, ties to even
  half_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

DEVICE u32 pack_halves(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

DEVICE float low_half(u32 x) { return half_to_float((half_t)x); }
DEVICE float high_half(u32 x) { return half_to_float((half_t)(x >> 16)); }

DEVICE u32 and_or(u32 x, u32 mask, u32 bits) {  // x & mask | bits, in one instruction
  u32 y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

DEVICE u32 half2_sub(u32 a, u32 b) {
  u32 y;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

DEVICE u32 half2_mul(u32 a, u32 b) {
  u32 y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

DEVICE u32 half2_fma(u32 a, u32 b, u32 c) {  // a * b + c, rounded once
  u32 y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

// 2^x to within a relative 2^-22: exactly 1 at 0, and 0 at minus infinity and wherever the result would be subnormal.
DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// -- warps --------------------------------------------------------------------------------------------------------

// c += a * b on tensor cores: a [16][16] and b [16][8] fp16, c [16][8] float32, spread over the warp. With g = lane / 4
// and t = lane % 4, in rows and columns of the whole tile:
//   a[0] = (g, 2t..2t+1), a[1] = (g + 8, 2t..), a[2] = (g, 2t+8..), a[3] = (g + 8, 2t+8..)
//   b[0] = rows 2t..2t+1 of column g, b[1] = rows 2t+8.. of it
//   c[0..1] = (g, 2t..2t+1), c[2..3] = (g + 8, 2t..2t+1)
// Source: PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
DEVICE void mma_16x8x16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 x 8 halves from shared memory; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes,
// aligned to 16). m[i] holds row g, columns 2t and 2t+1 of matrix i; transposed: rows 2t and 2t+1 of column g.
DEVICE void load_matrices(u32 (&m)[4], const void* row) {
  const u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address) : "memory");
}

DEVICE void load_matrices_transposed(u32 (&m)[4], const void* row) {
  const u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address) : "memory");
}

// -- memory -------------------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, in the background; zeros if not `valid` (then `from` is not read).
DEVICE void copy_async(void* shared, const void* from, bool valid = true) {
  const u32 to = (u32)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// The same for what no block reads again soon: L2 evicts it first, so that a step's weights do not displace the little
// that every layer reads: tables, norms, what the previous layer has written.
DEVICE void copy_async_once(void* shared, const void* from, bool valid = true) {
  const u32 to = (u32)__cvta_generic_to_shared(shared);
  asm volatile(
      "{ .reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, once; }"
      : : "r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// The copies that this thread has begun since the last commit become a group.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until at most `pending` of this thread's latest groups are in flight. Other threads' copies need a barrier too.
template <int pending> DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(pending) : "memory");
}

// Brings `bytes`, a multiple of 16, into L2 for copy_async_once, while the previous kernel still runs.
DEVICE void prefetch(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
      "cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, once; }"
      : : "l"(from), "r"(bytes) : "memory");
#endif
}

// -- consecutive kernels ------------------------------------------------------------------------------------------

// From sm_90 on, the blocks of a kernel begin as soon as all blocks of the previous one have passed this call and leave
// room (programmatic dependent launch): what a kernel does ahead of the call hides its launch overhead. When the call
// returns, all earlier kernels have ended and everything they wrote is visible: all of them, not only the latest,
// because every thread of every kernel makes the call. Older GPUs start a kernel when the previous one has ended.
// Source: PTX ISA, "griddepcontrol".
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// -- across threads ------------------------------------------------------------------------------------------------

DEVICE float warp_sum(float x) {  // the same in every lane, added in a fixed order
#pragma unroll
  for (int lane = 16; lane; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// True in the last of `blocks` blocks to call it with this counter, which must be 0 before and is 0 again after. That
// block then sees what the others wrote to global memory before their calls. Every thread of the block calls it;
// `scratch` is an int in shared memory.
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
