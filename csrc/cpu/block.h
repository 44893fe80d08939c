// A transformer block from the kernels of its parts: for one image, calling them one by one from Python takes as long
// as an attention.
#pragma once

#include "cpu/attention.h"
#include "cpu/linear.h"

namespace {

using vitfast::BlockArgs;

template <class T>
inline void block_of(const BlockArgs& a) {
  const int64_t rows = a.B * a.N, inner = a.H * a.D;
  const Workspaces memory(1, rows * inner * 4 * sizeof(T));
  T* const qkv = (T*)memory.of(0);
  T* const attended = qkv + rows * inner * 3;
  linear({.x = a.x,
          .norm = a.norm1,
          .normalises = true,
          .weight = a.qkv,
          .out = qkv,
          .rows = rows,
          .dtype = a.dtype,
          .threads = a.threads});
  const auto part = [&](int64_t i) {
    return HeadsView{.data = qkv + i * inner, .image = a.N * inner * 3, .token = inner * 3, .head = a.D};
  };
  attention({.q = part(0),
             .k = part(1),
             .v = part(2),
             .out = attended,
             .B = a.B,
             .H = a.H,
             .Nq = a.N,
             .Nk = a.N,
             .D = a.D,
             .scale = a.scale,
             .dtype = a.dtype,
             .threads = a.threads});
  linear({.x = attended,
          .weight = a.proj,
          .residual = a.x,
          .residual_rows = rows,
          .out = a.out,
          .rows = rows,
          .dtype = a.dtype,
          .threads = a.threads});
  mlp({.x = a.out,
       .norm = a.norm2,
       .fc1 = a.fc1,
       .fc2 = a.fc2,
       .out = a.out,
       .rows = rows,
       .dtype = a.dtype,
       .act = a.act,
       .threads = a.threads});
}

inline void block(const BlockArgs& args) {
  if (args.dtype == DType::fp32) return block_of<float>(args);
  block_of<Bf16>(args);
}

}  // namespace
