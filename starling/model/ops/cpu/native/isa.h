// Which instruction sets this machine has.
#pragma once
#include "types.h"

// The name of the i-th set that the kernels are compiled for and this machine can run, best first; null past the last.
STARLING_API const char* starling_usable_isa(int i);

// The name of a set that this machine has but its system refuses to this process; null if there is none.
STARLING_API const char* starling_refused_isa();
