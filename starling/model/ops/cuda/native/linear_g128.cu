// Linears with a group size of 128.
#include "linear.h"

KERNEL(256, 2) narrow(LINEAR_PARAMETERS) { linear_narrow<Int4<128>, 8, false>(LINEAR); }
KERNEL(256, 2) narrow_norm(LINEAR_PARAMETERS) { linear_narrow<Int4<128>, 8, true>(LINEAR); }
KERNEL(256, 2) wide_8(LINEAR_PARAMETERS) { linear_wide<Int4<128>, 1, 1, 2, 4>(LINEAR); }
KERNEL(256, 2) wide_16(LINEAR_PARAMETERS) { linear_wide<Int4<128>, 2, 1, 2, 4>(LINEAR); }
KERNEL(256, 2) wide_32(LINEAR_PARAMETERS) { linear_wide<Int4<128>, 4, 1, 2, 4>(LINEAR); }
KERNEL(256) wide_64(LINEAR_PARAMETERS) { linear_wide<Int4<128>, 8, 1, 1, 5>(LINEAR); }
KERNEL(256) wide_64_tall(LINEAR_PARAMETERS) { linear_wide<Int4<128>, 8, 2, 1, 2>(LINEAR); }
