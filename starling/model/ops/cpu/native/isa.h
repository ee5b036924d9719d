// Which instruction sets this machine has.
#pragma once
#include "types.h"

// The name of the i-th that the kernels are compiled for and this machine can run, best first; null beyond the last.
STARLING_API const char* starling_usable_isa(int i);

// The name of one that this machine has and its system refuses to this process; null when there is none.
STARLING_API const char* starling_refused_isa();
