// softmax(scale q k^T) v, one head at a time: its keys and values are packed once for a product that reads them in
// order; then a few query rows at a time get all their logits, the softmax and their output. No online softmax: the
// logits of so few queries stay in the cache up to tens of thousands of keys.
#pragma once

#include <math.h>

#include "cpu/attention_panels.h"
#include "cpu/attention_tiles.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace {

using vitfast::AttentionArgs;
using vitfast::DType;
using vitfast::HeadsView;

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// Logits of one query -> weights times their sum, in place, 0 from n to padded, a multiple of LANES; returns the sum,
// and the largest logit times log2 e.
inline float exponentiate(float* logits, int64_t n, int64_t padded, float scale, float* most, float*) {
  const float factor = scale * LOG2_E;
  Floats high = splat(-INFINITY), sum = {};
  // scaled and rounded first: a fused multiply and subtract would give the largest logit a weight beside 1
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    const Floats scaled = load(logits + j) * factor;
    store(logits + j, scaled);
    high = larger(scaled, high);
  }
  *most = largest_of(high);
  for (; j < n; ++j) *most = (logits[j] *= factor) > *most ? logits[j] : *most;
  for (; j < padded; ++j) logits[j] = -INFINITY;
  for (j = 0; j < padded; j += LANES) {
    const Floats weight = exp2_of(load(logits + j) - *most);
    store(logits + j, weight);
    sum += weight;
  }
  return sum_of(sum);
}

// The same for weights that are rounded to bf16: they go to a place of their own, and are worth fewer instructions.
inline float exponentiate(float* logits, int64_t n, int64_t padded, float scale, float* most, Bf16* weights) {
  const float factor = scale * LOG2_E;
  const int64_t whole = n / LANES * LANES;
  Floats high = splat(-INFINITY), sum = {};
  for (int64_t j = 0; j < whole; j += LANES) high = larger(load(logits + j) * factor, high);
  *most = largest_of(high);
  for (int64_t j = whole; j < n; ++j) *most = (logits[j] *= factor) > *most ? logits[j] : *most;
  for (int64_t j = n; j < padded; ++j) logits[j] = -INFINITY;
  for (int64_t j = 0; j < padded; j += LANES) {
    Floats logit = load(logits + j);
    // rounded now and not in one step with the subtraction, or the largest of huge logits would not meet itself
    if (j < whole) logit = rounded_product(logit, splat(factor));
    const Floats weight = exp2_for_bf16(logit - *most);
    store(weights + j, weight);
    sum += weight;
  }
  return sum_of(sum);
}

// Products: how a head's operands lie and are multiplied.
template <class Products>
class Attention {
  using T = typename Products::Number;
  using Weight = typename Products::Weight;
  static constexpr int64_t QUERIES = Products::QUERIES;
  static constexpr bool in_place = sizeof(Weight) == sizeof(float);  // weights take the place of logits

 public:
  explicit Attention(const AttentionArgs& args) : a(args), products(args) {
    const int64_t logits = QUERIES * products.logits_row;
    // every part of a thread's workspace starts on a cache line
    const int64_t sizes[] = {products.keys_size(),      products.values_size(),     products.queries_size(), logits,
                             in_place ? 0 : logits / 2, QUERIES * products.out_row, products.scratch_size()};
    for (int i = 0; i < 7; ++i) offset[i + 1] = offset[i] + round_up(sizes[i], 16);
  }

  void run() const {
    // a head is one task, or several where there are too few heads to keep all threads busy
    const int64_t heads = a.B * a.H, blocks = (a.Nq + QUERIES - 1) / QUERIES;
    int64_t parts = heads >= 4 * a.threads || heads % a.threads == 0 ? 1 : (4 * a.threads + heads - 1) / heads;
    if (parts > blocks) parts = blocks;
    const Workspaces workspaces(a.threads, offset[7] * 4);
    run_tasks(heads * parts, a.threads, [&](int64_t task, int thread) {
      const int64_t part = task % parts, first = blocks * part / parts, last = blocks * (part + 1) / parts;
      run_head(task / parts / a.H, task / parts % a.H, first * QUERIES, last * QUERIES, (float*)workspaces.of(thread));
    });
  }

 private:
  void run_head(int64_t b, int64_t h, int64_t first, int64_t last, float* memory) const {
    float *const k = memory + offset[0], *const v = memory + offset[1], *const q = memory + offset[2];
    float *const logits = memory + offset[3], *const out = memory + offset[5], *const scratch = memory + offset[6];
    Weight* const weights = (Weight*)(in_place ? logits : memory + offset[4]);
    const int64_t row = products.logits_row;
    products.pack_keys([&](int64_t j) { return j < a.Nk ? at(a.k, b, j, h) : nullptr; }, k, scratch);
    products.pack_values([&](int64_t j) { return j < a.Nk ? at(a.v, b, j, h) : nullptr; }, v, scratch);
    if (last > a.Nq) last = a.Nq;
    typename Products::Registers registers;
    for (int64_t i = first; i < last; i += QUERIES) {
      const int64_t rows = last - i < QUERIES ? last - i : QUERIES;
      products.pack_queries([&](int64_t r) { return at(a.q, b, i + r, h); }, rows, q);
      products.multiply_keys(registers, q, k, logits, rows);
      float scales[QUERIES];
      for (int64_t r = 0; r < rows; ++r) {
        float most;
        const float sum = exponentiate(logits + r * row, a.Nk, row, a.scale, &most, weights + r * row);
        scales[r] = 1 / sum;
        if (a.lse) a.lse[(b * a.H + h) * a.Nq + i + r] = most * LN_2 + logf(sum);
      }
      products.multiply_values(registers, weights, v, out, rows);
      for (int64_t r = 0; r < rows; ++r)
        write((T*)a.out + ((b * a.Nq + i + r) * a.H + h) * a.D, out + r * products.out_row, scales[r]);
    }
  }

  static const T* at(const HeadsView& view, int64_t b, int64_t n, int64_t h) {
    return (const T*)view.data + b * view.image + n * view.token + h * view.head;
  }

  void write(T* to, const float* from, float scale) const {
    int64_t d = 0;
    for (; d + LANES <= a.D; d += LANES) store(to + d, load(from + d) * scale);
    if (d < a.D) store_part(to + d, load(from + d) * scale, a.D - d);
  }

  const AttentionArgs& a;
  const Products products;
  int64_t offset[8] = {};  // of k, v, q, logits, weights, out, scratch in a thread's workspace, and its size
};

inline void attention(const AttentionArgs& args) {
  if (args.dtype == DType::fp32) return Attention<PanelProducts<SingleCells, float>>(args).run();
  if (args.dtype == DType::fp16) return Attention<PanelProducts<SingleCells, Fp16>>(args).run();
#if defined(VITFAST_TILES)
  return Attention<TileProducts>(args).run();
#elif defined(__AVX512BF16__)
  return Attention<PanelProducts<PairCells, Bf16>>(args).run();
#else
  return Attention<PanelProducts<SingleCells, Bf16>>(args).run();
#endif
}

}  // namespace
