// Compiled once per instruction set, with its compiler flags and VITFAST_ISA as its name: one table of kernels each.
#include "cpu_kernels.h"

#include "activation_cpu.h"
#include "attention_cpu.h"
#include "block_cpu.h"
#include "embed_cpu.h"
#include "layer_norm_cpu.h"
#include "linear_cpu.h"
#include "patch_rows_cpu.h"

#define VITFAST_CONCATENATE(a, b) a##b
#define VITFAST_TABLE(isa) VITFAST_CONCATENATE(kernels_, isa)
#define VITFAST_STRING(isa) #isa
#define VITFAST_NAME(isa) VITFAST_STRING(isa)

namespace vitfast {

const CpuKernels VITFAST_TABLE(VITFAST_ISA) = {
    VITFAST_NAME(VITFAST_ISA), attention, activation, layer_norm, linear, mlp, pack_weight, block, embed, multiplies, patch_rows};

}  // namespace vitfast
