// The linears of groups of 32.
#include "linear.h"

KERNEL(256) narrow(LINEAR_PARAMETERS) { linear_narrow<Int4Stream<32, 8>, false>(LINEAR); }
KERNEL(256) narrow_norm(LINEAR_PARAMETERS) { linear_narrow<Int4Stream<32, 8>, true>(LINEAR); }
KERNEL(256) wide_8(LINEAR_PARAMETERS) { linear_wide<Int4Stream<32, 8>, 1, 1, 8, 3>(LINEAR); }
KERNEL(256) wide_16(LINEAR_PARAMETERS) { linear_wide<Int4Stream<32, 8>, 2, 1, 4, 3>(LINEAR); }
KERNEL(256) wide_32(LINEAR_PARAMETERS) { linear_wide<Int4Stream<32, 4>, 4, 1, 2, 3>(LINEAR); }
KERNEL(256) wide_64(LINEAR_PARAMETERS) { linear_wide<Int4Stream<32, 4>, 8, 1, 1, 2>(LINEAR); }
KERNEL(256) wide_64_tall(LINEAR_PARAMETERS) { linear_wide<Int4Stream<32, 2>, 8, 2, 1, 3>(LINEAR); }
