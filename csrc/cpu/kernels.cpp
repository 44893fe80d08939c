// Compiled once per instruction set, with its compiler flags and VITFAST_ISA as its name: one table of kernels each.
#include "cpu/kernels.h"

#include "cpu/activation.h"
#include "cpu/attention.h"
#include "cpu/block.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/linear_unpacked.h"
#include "cpu/patch_embed.h"
#include "cpu/patch_rows.h"

#define VITFAST_CONCATENATE(a, b) a##b
#define VITFAST_TABLE(isa) VITFAST_CONCATENATE(kernels_, isa)
#define VITFAST_STRING(isa) #isa
#define VITFAST_NAME(isa) VITFAST_STRING(isa)

namespace vitfast {

const CpuKernels VITFAST_TABLE(VITFAST_ISA) = {.name = VITFAST_NAME(VITFAST_ISA),
                                               .attention = attention,
                                               .activation = activation,
                                               .layer_norm = layer_norm,
                                               .linear = linear,
                                               .linear_unpacked = linear_unpacked,
                                               .takes_unpacked = takes_unpacked,
                                               .mlp = mlp,
                                               .packed_bytes = packed_bytes,
                                               .pack_weight = pack_weight,
                                               .block = block,
                                               .embed = embed,
                                               .multiplies = multiplies,
                                               .patch_rows = patch_rows};

}  // namespace vitfast
