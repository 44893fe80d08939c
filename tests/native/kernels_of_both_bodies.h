// A table beside those of kernels.h, for programs that know theirs as VITFAST_ISA.
#pragma once

#include "cpu/kernels.h"

namespace vitfast {
extern const CpuKernels kernels_both;
}
