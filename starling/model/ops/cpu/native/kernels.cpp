// The kernels for the instruction set that this file is compiled for.
#include "types.h"

// Sums do not stay in registers if the compiler deems a loop's body too long to inline; and GCC drops calls of a
// function that only prefetches, as having no effect, unless it must inline it first.
#define STARLING_INLINE inline __attribute__((always_inline))

// Gives a tile's loops their own register allocation: inlined into the dispatch over many shapes, GCC kept sums in
// memory (AVX2: 4 answers at once took 1.25 x as long).
#define STARLING_NOINLINE __attribute__((noinline))

// Forces the sum `x` to be computed here, in a vector register: GCC would delay many additions until their sum is used,
// and keep the products in memory until then.
#define STARLING_IN_REGISTER(x) asm("" : "+v"(x))

// Values read before this barrier are not kept in registers beyond it, and later reads are not moved ahead of it.
#define STARLING_COMPILER_BARRIER asm volatile("" : : : "memory")

#if defined(__AVX512F__)
#include "vector_avx512.h"
#elif defined(__AVX2__)
#include "vector_avx2.h"
#elif defined(__aarch64__)
#include "vector_neon.h"
#else
#include "vector_portable.h"
#endif

// A matrix unit, where there is one, serves steps of many tokens.
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
