// Images -> tokens with a packed projection: the rows of pixels live in kept scratch memory, positions are added to the
// sums of the product, and prefix tokens are written over the rows of zeros that were left for them.
#pragma once

#include <cstring>

#include "cpu/linear.h"
#include "cpu/patch_rows.h"

namespace {

using vitfast::EmbedArgs;

inline void embed(const EmbedArgs& a) {
  const int64_t tokens = rows_per_image(a.patches.geometry), size = a.patches.to == DType::fp32 ? 4 : 2;
  const int64_t rows = a.patches.B * tokens, prefix = a.patches.geometry.P, D = a.weight.D;
  const Workspaces memory(1, rows * a.weight.K * size);
  PatchRowsArgs patches = a.patches;
  patches.rows = memory.of(0);
  patch_rows(patches);
  linear({.x = memory.of(0),
          .weight = a.weight,
          .residual = a.positions,
          .residual_rows = tokens,
          .out = a.tokens,
          .rows = rows,
          .dtype = a.patches.to,
          .threads = a.patches.threads});
  for (int64_t b = 0; prefix && b < a.patches.B; ++b)
    memcpy((char*)a.tokens + b * tokens * D * size, a.prefix, prefix * D * size);
}

}  // namespace
