// softmax(scale q k^T) v, one head at a time: its keys and values are packed once into panels that an inner product
// reads in order; then a few query rows at a time get all their logits, the softmax and their output. No online
// softmax: the logits of ROWS queries stay in the cache up to tens of thousands of keys.
#pragma once

#include <math.h>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/workspace.h"

namespace {

using vitfast::AttentionArgs;
using vitfast::DType;
using vitfast::HeadsView;

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// How many cells of a query and a key, or of weights and values, are summed up in one chain: in fp32 few, for
// exactness, but chains of 16 in place of 64 would take a tenth longer; bf16 rounds more elsewhere.
template <class Cells>
constexpr int64_t PIECE = Cells::numbers == 1 ? 64 : 512;

// c[rows][columns] = a[rows][depth] b, where b is packed in panels; columns is a multiple of LANES
template <class Cells, class Cell = typename Cells::Cell>
inline void multiply_panels(const Cell* a, int64_t a_row, const Cell* b, int64_t depth, float* c, int64_t columns,
                            int64_t rows) {
  for (int64_t j = 0; j < columns; j += PANEL) {
    for (int64_t k = 0; k < depth; k += PIECE<Cells>) {
      const int64_t end = depth - k < PIECE<Cells> ? depth : k + PIECE<Cells>;
      multiply_rows<Cells>(a, a_row, b + j * depth, k, end, c + j, columns, columns - j >= PANEL, rows);
    }
  }
}

// Logits of one query -> weights times their sum, in place, 0 from n to padded; returns the sum, and the largest logit
// times log2 e.
inline float exponentiate(float* logits, int64_t n, int64_t padded, float scale, float* most) {
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

#if defined(__AVX512BF16__)
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
    if (j < whole) {
      logit = logit * factor;
      // rounded now and not in one step with the subtraction, or the largest of huge logits would not meet itself
      asm("" : "+v"(logit));
    }
    const Floats weight = exp2_for_bf16(logit - *most);
    store(weights + j, weight);
    sum += weight;
  }
  return sum_of(sum);
}
#endif

template <class Cells, class T>
class Attention {
  using Cell = typename Cells::Cell;
  static constexpr bool pairs = Cells::numbers == 2;

 public:
  explicit Attention(const AttentionArgs& args)
      : a(args),
        keys(round_up(a.Nk, LANES)),
        width(round_up(a.D, LANES)),
        depth((a.D + Cells::numbers - 1) / Cells::numbers),
        key_depth((a.Nk + Cells::numbers - 1) / Cells::numbers) {
    // every part of a thread's workspace starts on a cache line
    const int64_t sizes[] = {keys * depth, width * key_depth, ROWS * depth, ROWS * keys, pairs ? ROWS * keys / 2 : 0,
                             ROWS * width, depth + width};
    for (int i = 0; i < 7; ++i) offset[i + 1] = offset[i] + round_up(sizes[i], 16);
  }

  void run() const {
    // a head is one task, or several where there are too few heads to keep all threads busy
    const int64_t heads = a.B * a.H, blocks = (a.Nq + ROWS - 1) / ROWS;
    int64_t parts = heads >= 4 * a.threads || heads % a.threads == 0 ? 1 : (4 * a.threads + heads - 1) / heads;
    if (parts > blocks) parts = blocks;
    const Workspaces workspaces(a.threads, offset[7] * 4);
    run_tasks(heads * parts, a.threads, [&](int64_t task, int thread) {
      const int64_t part = task % parts, first = blocks * part / parts, last = blocks * (part + 1) / parts;
      run_head(task / parts / a.H, task / parts % a.H, first * ROWS, last * ROWS, (float*)workspaces.of(thread));
    });
  }

 private:
  void run_head(int64_t b, int64_t h, int64_t first, int64_t last, float* memory) const {
    Cell* const k = (Cell*)(memory + offset[0]);
    Cell* const v = (Cell*)(memory + offset[1]);
    Cell* const q = (Cell*)(memory + offset[2]);
    float* const logits = memory + offset[3];
    float* const out = memory + offset[5];
    Cell* const row = (Cell*)(memory + offset[6]);
    pack_keys(b, h, k, row);
    pack_values(b, h, v, row);
    if (last > a.Nq) last = a.Nq;
    for (int64_t i = first; i < last; i += ROWS) {
      const int64_t rows = last - i < ROWS ? last - i : ROWS;
      memset(q, 0, ROWS * depth * 4);
      for (int64_t r = 0; r < rows; ++r) Cells::from_row(at(a.q, b, i + r, h), a.D, q + r * depth);
      multiply_panels<Cells>(q, depth, k, depth, logits, keys, rows);
      float scales[ROWS];
      for (int64_t r = 0; r < rows; ++r) {
        float most;
        const float sum = exponentiate_row(memory, r, &most);
        scales[r] = 1 / sum;
        if (a.lse) a.lse[(b * a.H + h) * a.Nq + i + r] = most * LN_2 + logf(sum);
      }
      multiply_weights(memory, rows, v, out);
      for (int64_t r = 0; r < rows; ++r)
        write((T*)a.out + ((b * a.Nq + i + r) * a.H + h) * a.D, out + r * width, scales[r]);
    }
  }

  static const T* at(const HeadsView& view, int64_t b, int64_t n, int64_t h) {
    return (const T*)view.data + b * view.image + n * view.token + h * view.head;
  }

  void pack_keys(int64_t b, int64_t h, Cell* packed, Cell* row) const {
    const auto key = [&](int64_t j) { return j < a.Nk ? at(a.k, b, j, h) : nullptr; };
    for (int64_t j = 0; j < keys; j += LANES) pack_transposed<Cells>(j, keys, a.D, key, packed, row);
  }

  void pack_values(int64_t b, int64_t h, Cell* packed, Cell* row) const {
    memset(row, 0, width * 4);
    for (int64_t c = 0; c < key_depth; ++c) {
      const int64_t j = c * Cells::numbers;
      const T* const rows[] = {at(a.v, b, j, h), j + 1 < a.Nk ? at(a.v, b, j + 1, h) : nullptr};
      Cells::from_rows(rows, a.D, row);
      for (int64_t d = 0; d < width; d += LANES) {
        const Column column(d, width, key_depth);
        memcpy(packed + column.start + c * column.step, row + d, LANES * 4);
      }
    }
  }

  float exponentiate_row(float* memory, int64_t row, float* most) const {
    float* const logits = memory + offset[3] + row * keys;
#if defined(__AVX512BF16__)
    if constexpr (pairs)
      return exponentiate(logits, a.Nk, keys, a.scale, most, (Bf16*)(memory + offset[4]) + row * keys);
#endif
    return exponentiate(logits, a.Nk, keys, a.scale, most);
  }

  void multiply_weights(float* memory, int64_t rows, const Cell* v, float* out) const {
    if constexpr (pairs) {
      multiply_panels<Cells>((const Cell*)(memory + offset[4]), keys / 2, v, key_depth, out, width, rows);
    } else {
      multiply_panels<Cells>(memory + offset[3], keys, v, key_depth, out, width, rows);
    }
  }

  void write(T* to, const float* from, float scale) const {
    int64_t d = 0;
    for (; d + LANES <= a.D; d += LANES) store(to + d, load(from + d) * scale);
    if (d < a.D) store_part(to + d, load(from + d) * scale, a.D - d);
  }

  const AttentionArgs& a;
  const int64_t keys, width;       // Nk and D in whole vectors
  const int64_t depth, key_depth;  // cells in D and Nk numbers
  int64_t offset[8] = {};          // of k, v, q, logits, weights, out, row in a thread's workspace, and its size
};

inline void attention(const AttentionArgs& args) {
  if (args.dtype == DType::fp32) return Attention<SingleCells, float>(args).run();
  if (args.dtype == DType::fp16) return Attention<SingleCells, Fp16>(args).run();
#if defined(__AVX512BF16__)
  return Attention<PairCells, Bf16>(args).run();
#else
  return Attention<SingleCells, Bf16>(args).run();
#endif
}

}  // namespace
