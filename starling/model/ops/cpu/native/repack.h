// A checkpoint's tensors → the layout of types.h. Each call does one run of blocks.
#pragma once
#include "types.h"

// AWQ: qweight int32 [columns][rows / 8], qzeros int32 [groups][rows / 8], scales fp16 [groups][rows].
// Blocks [first, last); the padding rows of the last block get zero scales.
void repack_awq(const uint32_t* qweight, const uint32_t* qzeros, const uint16_t* scales, int64_t rows, int64_t columns,
                int64_t group, uint8_t* weight, uint16_t* packed_scales, uint8_t* zeros, int64_t first, int64_t last);
// An fp16 matrix [rows][columns], to 8 bits per weight with a scale per group, or as it is.
void repack_half_to_8(const uint16_t* matrix, int64_t rows, int64_t columns, int64_t group, uint8_t* weight,
                      uint16_t* scales, int64_t first, int64_t last, const Kernels* kernels);
void repack_half(const uint16_t* matrix, int64_t rows, int64_t columns, int64_t group, uint16_t* weight, int64_t first,
                 int64_t last);
