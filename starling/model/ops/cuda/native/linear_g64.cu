// Linears with a group size of 64.
#include "linear.h"

KERNEL(256, 2) narrow(LINEAR_PARAMETERS) { linear_narrow<Int4<64>, 8, false>(LINEAR); }
KERNEL(256, 2) narrow_norm(LINEAR_PARAMETERS) { linear_narrow<Int4<64>, 8, true>(LINEAR); }
KERNEL(256, 2) wide_8(LINEAR_PARAMETERS) { linear_wide<Int4<64>, 1, 1, 2, 4>(LINEAR); }
KERNEL(256, 2) wide_16(LINEAR_PARAMETERS) { linear_wide<Int4<64>, 2, 1, 2, 4>(LINEAR); }
KERNEL(256, 2) wide_32(LINEAR_PARAMETERS) { linear_wide<Int4<64>, 4, 1, 2, 4>(LINEAR); }
KERNEL(256) wide_64(LINEAR_PARAMETERS) { linear_wide<Int4<64>, 8, 1, 1, 5>(LINEAR); }
