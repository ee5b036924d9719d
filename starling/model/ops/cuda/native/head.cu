// The output projection, in fp16.
#include "linear.h"

KERNEL(256, 2) narrow(LINEAR_PARAMETERS) { linear_narrow<Half, 4, false>(LINEAR); }
KERNEL(256, 2) wide_8(LINEAR_PARAMETERS) { linear_wide<Half, 1, 1, 1, 3>(LINEAR); }
KERNEL(256, 2) wide_16(LINEAR_PARAMETERS) { linear_wide<Half, 2, 1, 1, 3>(LINEAR); }
KERNEL(256, 2) wide_32(LINEAR_PARAMETERS) { linear_wide<Half, 4, 1, 1, 3>(LINEAR); }
KERNEL(256) wide_64(LINEAR_PARAMETERS) { linear_wide<Half, 8, 1, 1, 2>(LINEAR); }
