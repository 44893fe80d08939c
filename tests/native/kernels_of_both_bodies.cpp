// The kernels of amx_bf16, before each of which the same with the plain body of tiles.h
// (kernels_plain_tiles, compiled with the same flags besides) has to give the same bits.
#include "kernels_of_both_bodies.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace vitfast {

namespace {

const CpuKernels &real = kernels_amx_bf16, &plain = kernels_plain_tiles;

int64_t size_of(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }

// The real kernel writes over what the plain one has to read, so the plain one goes first, elsewhere.
template <class Args>
void compare(const char* kernel, Args args, void* Args::* out, int64_t bytes,
             void (*CpuKernels::*function)(const Args&)) {
  std::vector<uint8_t> expected(bytes);
  Args to_there = args;
  to_there.*out = expected.data();
  (plain.*function)(to_there);
  (real.*function)(args);
  if (!std::memcmp(args.*out, expected.data(), bytes)) return;
  int64_t i = 0;
  while (((const uint8_t*)(args.*out))[i] == expected[i]) ++i;
  std::printf("%s: byte %ld of %ld differs\n", kernel, (long)i, (long)bytes);
  std::exit(1);
}

void attention(const AttentionArgs& a) {
  if (a.lse) {
    AttentionArgs other = a;
    const int64_t numbers = a.B * a.H * a.Nq;
    std::vector<float> lse(numbers);
    std::vector<uint8_t> out(a.B * a.Nq * a.H * a.D * size_of(a.dtype));
    other.lse = lse.data();
    other.out = out.data();
    plain.attention(other);
    real.attention(a);
    if (std::memcmp(a.lse, other.lse, 4 * numbers)) {
      std::puts("lse differs");
      std::exit(1);
    }
  }
  AttentionArgs without = a;
  without.lse = nullptr;
  compare("attention", without, &AttentionArgs::out, a.B * a.Nq * a.H * a.D * size_of(a.dtype), &CpuKernels::attention);
}
void layer_norm(const LayerNormArgs& a) {
  compare("layer_norm", a, &LayerNormArgs::y, a.rows * a.D * size_of(a.dtype), &CpuKernels::layer_norm);
}
void linear(const LinearArgs& a) {
  compare("linear", a, &LinearArgs::out, a.rows * a.weight.D * size_of(a.dtype), &CpuKernels::linear);
}
void linear_unpacked(const LinearArgs& a) {
  compare("linear_unpacked", a, &LinearArgs::out, a.rows * a.weight.D * size_of(a.dtype), &CpuKernels::linear_unpacked);
}
void mlp(const MlpArgs& a) { compare("mlp", a, &MlpArgs::out, a.rows * a.fc2.D * size_of(a.dtype), &CpuKernels::mlp); }
void pack_weight(const PackWeightArgs& a) {
  const int64_t bytes = real.packed_bytes(a.D, a.K, a.dtype);
  if (bytes != plain.packed_bytes(a.D, a.K, a.dtype)) {
    std::puts("packed_bytes differs");
    std::exit(1);
  }
  compare("pack_weight", a, &PackWeightArgs::packed, bytes, &CpuKernels::pack_weight);
}
void block(const BlockArgs& a) {
  compare("block", a, &BlockArgs::out, a.B * a.N * a.proj.D * size_of(a.dtype), &CpuKernels::block);
}
void embed(const EmbedArgs& a) {
  const PatchGeometry& g = a.patches.geometry;
  const int64_t tokens = g.P + g.H / g.ph * (g.W / g.pw);
  compare("embed", a, &EmbedArgs::tokens, a.patches.B * tokens * a.weight.D * size_of(a.patches.to),
          &CpuKernels::embed);
}

}  // namespace

const CpuKernels kernels_both = [] {
  CpuKernels both = real;
  both.attention = attention;
  both.layer_norm = layer_norm;
  both.linear = linear;
  both.linear_unpacked = linear_unpacked;
  both.mlp = mlp;
  both.pack_weight = pack_weight;
  both.block = block;
  both.embed = embed;
  return both;
}();

}  // namespace vitfast
