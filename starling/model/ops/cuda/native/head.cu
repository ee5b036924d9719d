// The output projection, in fp16.
#include "linear.h"

KERNEL(256, 2) narrow(LINEAR_PARAMETERS) { linear_narrow<HalfStream<2>, false>(LINEAR); }
KERNEL(256, 2) narrow_norm(LINEAR_PARAMETERS) { linear_narrow<HalfStream<2>, true>(LINEAR); }
KERNEL(256, 2) wide_8(LINEAR_PARAMETERS) { linear_wide<HalfStream<2>, 1, 1, 2, 3>(LINEAR); }
KERNEL(256) wide_16(LINEAR_PARAMETERS) { linear_wide<HalfStream<2>, 2, 1, 2, 3>(LINEAR); }
KERNEL(256) wide_32(LINEAR_PARAMETERS) { linear_wide<HalfStream<2>, 4, 1, 2, 3>(LINEAR); }
KERNEL(256) wide_64(LINEAR_PARAMETERS) { linear_wide<HalfStream<1>, 8, 1, 1, 2>(LINEAR); }
