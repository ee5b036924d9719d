// The kernels of the instruction set that this is compiled for.
#include "types.h"

// Sums that stay in registers are lost if the compiler thinks that a loop's body is too long to inline; and GCC drops
// the calls of a function that only prefetches, since it finds no effect in it, unless it must be inlined first.
#define STARLING_INLINE inline __attribute__((always_inline))

// A tile's loops get registers of their own: within what calls them for many shapes, GCC kept sums in memory (AVX2: 4
// answers took 1.25 x as long).
#define STARLING_NOINLINE __attribute__((noinline))

// A sum in vector register `x` is made here: GCC would add many products only where their sum is used, and keep them in
// memory until then.
#define STARLING_NOW(x) asm("" : "+v"(x))

// What is read before this is not kept in a register for later, nor read here ahead of its use.
#define STARLING_APART asm volatile("" : : : "memory")

#if defined(__AVX512F__)
#include "vector_avx512.h"
#elif defined(__AVX2__)
#include "vector_avx2.h"
#elif defined(__aarch64__)
#include "vector_neon.h"
#else
#include "vector_portable.h"
#endif

// A unit that multiplies small matrices serves steps of many tokens.
#if defined(__AMX_INT8__)
#include "unit_amx.h"
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#include "unit_i8mm.h"
#else
constexpr int kMatrixPlanes = 0, kMatrixBlocks = 0, kMatrixRun = 0;
#endif

#include "linear.h"
#include "elementwise.h"
#include "attention.h"

const Kernels starling_kernels = {
    kPlanes, kMatrixPlanes, kMatrixBlocks,    kMatrixRun, kTileBytes, quantize, linear,
    attend,  merge,         rotate_and_write, add_norm,   silu_mul,   widen,    exp_scaled,
};
