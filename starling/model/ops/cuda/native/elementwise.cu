// A token's embedding; the other small operations join it.
#include "device.h"

// table fp16 [V][hidden] at ids [tokens] → out float32 [tokens][hidden]. An id below 0 is -(1 + row) of `sampled`, what
// the step before drew, which the host need not know yet.
KERNEL(256) embed(const int* ids, const int* sampled, const half_t* table, float* out, int hidden) {
  const int id = ids[blockIdx.x] >= 0 ? ids[blockIdx.x] : sampled[-1 - ids[blockIdx.x]];
  for (int i = threadIdx.x; i < hidden; i += blockDim.x)
    out[(i64)blockIdx.x * hidden + i] = half_to_float(table[(i64)id * hidden + i]);
}
