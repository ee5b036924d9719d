// Which instruction sets this machine can run.
#pragma once
#include "types.h"

// The kernels of `name`, or of the best set for "auto". Null if this build or this machine lacks it.
const Kernels* find_kernels(const char* name);
// The i-th name that find_kernels accepts here, best first; null past the end.
const char* usable_isa(int i);
