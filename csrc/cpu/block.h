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
  linear({a.x, a.norm1, true, a.qkv, nullptr, 0, qkv, rows, a.dtype, vitfast::NO_ACT, a.threads});
  const auto part = [&](int64_t i) { return HeadsView{qkv + i * inner, a.N * inner * 3, inner * 3, a.D}; };
  attention({part(0), part(1), part(2), attended, nullptr, a.B, a.H, a.N, a.N, a.D, a.scale, a.dtype, a.threads});
  linear({attended, {}, false, a.proj, a.x, rows, a.out, rows, a.dtype, vitfast::NO_ACT, a.threads});
  mlp({a.out, a.norm2, a.fc1, a.fc2, a.out, rows, a.dtype, a.act, a.threads});
}

inline void block(const BlockArgs& args) {
  if (args.dtype == DType::fp32) return block_of<float>(args);
  block_of<Bf16>(args);
}

}  // namespace
