// softmax(scale q k^T) v, one head at a time: its keys and values are packed once into panels that an inner product reads
// in order; then a few query rows at a time get all their logits, the softmax and their output.
// No online softmax: the logits of ROWS queries stay in the cache up to tens of thousands of keys.
#pragma once

#include <math.h>
#include <cstdlib>
#include <new>

#include "cpu_kernels.h"
#include "parallel.h"
#include "simd.h"

namespace {

using vitfast::AttentionArgs;
using vitfast::DType;
using vitfast::HeadsView;

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

// With panels of two vectors ROWS * 2 sums, a panel and a broadcast fill the registers.
constexpr int64_t ROWS = REGISTERS == 32 ? 12 : 6;
constexpr int64_t PANEL = 2 * LANES;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A cell is what one lane multiplies at a time: one fp32 number, or two bf16 numbers side by side.
struct SingleCells {
  using Cell = float;
  static constexpr int64_t numbers = 1;
  // summed up one after the other; the sums of such pieces are added. One long chain would round too often.
  static constexpr int64_t piece = 16;
  static Floats add_product(Floats sum, Floats a, Floats b) { return sum + a * b; }

  template <class T>
  static void from_row(const T* row, int64_t n, float* cells) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(cells + i, load(row + i));
    if (i < n) store_part(cells + i, load_part(row + i, n - i), n - i);
  }
  template <class T>
  static Floats load_cells(const T* row, int64_t c) {
    return load(row + c);
  }
  // `rows` has one row
  template <class T>
  static void from_rows(const T* const* rows, int64_t n, float* cells) {
    from_row(rows[0], n, cells);
  }
};

#if defined(__AVX512BF16__)
struct PairCells {
  using Cell = uint32_t;
  static constexpr int64_t numbers = 2;
  static constexpr int64_t piece = 512;
  static Floats add_product(Floats sum, Floats a, Floats b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  // pairs of neighbours in a row
  static void from_row(const Bf16* row, int64_t n, uint32_t* cells) {
    memcpy(cells, row, n / 2 * 4);
    if (n % 2) cells[n / 2] = row[n - 1].bits;
  }
  static Floats load_cells(const Bf16* row, int64_t c) { return load_bits<Floats>(row + 2 * c); }
  // pairs of neighbours in a column; the second row may be missing
  static void from_rows(const Bf16* const* rows, int64_t n, uint32_t* cells) {
    static const Bf16 zeros[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
      const Halves low = load_bits<Halves>(rows[0] + i), high = load_bits<Halves>(rows[1] ? rows[1] + i : zeros);
      store_bits(cells + i, widen(low) | (widen(high) << 16));
    }
    for (; i < n; ++i) cells[i] = rows[0][i].bits | (rows[1] ? uint32_t{rows[1][i].bits} << 16 : 0);
  }
};
#endif

// c[ROWS][VECTORS * LANES] = a[ROWS][depth] b[depth][VECTORS * LANES], plus c from the second piece of depth on
template <class Cells, int VECTORS, class Cell = typename Cells::Cell>
inline void multiply(const Cell* a, int64_t a_row, const Cell* b, int64_t first, int64_t last, float* c,
                     int64_t c_row) {
  Floats sum[ROWS][VECTORS] = {};
  for (int64_t k = first; k < last; ++k) {
    Floats panel[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) panel[v] = load_bits<Floats>(b + (k * VECTORS + v) * LANES);
#pragma GCC unroll 12
    for (int64_t i = 0; i < ROWS; ++i) {
      const Floats x = splat(load_bits<float>(a + i * a_row + k));
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = Cells::add_product(sum[i][v], x, panel[v]);
    }
  }
#pragma GCC unroll 12
  for (int64_t i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* const to = c + i * c_row + v * LANES;
      store(to, first ? load(to) + sum[i][v] : sum[i][v]);
    }
  }
}

// c[ROWS][columns] = a[ROWS][depth] b, where b is packed in panels; columns is a multiple of LANES
template <class Cells, class Cell = typename Cells::Cell>
inline void multiply_panels(const Cell* a, int64_t a_row, const Cell* b, int64_t depth, float* c, int64_t columns) {
  for (int64_t j = 0; j < columns; j += PANEL) {
    for (int64_t k = 0; k < depth; k += Cells::piece) {
      const int64_t end = depth - k < Cells::piece ? depth : k + Cells::piece;
      if (columns - j >= PANEL)
        multiply<Cells, 2>(a, a_row, b + j * depth, k, end, c + j, columns);
      else
        multiply<Cells, 1>(a, a_row, b + j * depth, k, end, c + j, columns);
    }
  }
}

// Where column j of a packed matrix begins, and how far its rows are apart.
struct Column {
  int64_t start, step;
  Column(int64_t j, int64_t columns, int64_t depth) {
    const int64_t panel = j / PANEL * PANEL;
    step = columns - panel < PANEL ? LANES : PANEL;
    start = panel * depth + (j - panel);
  }
};

// Logits of one query -> weights times their sum, in place; returns the sum, and the largest logit times log2 e.
inline float exponentiate(float* logits, int64_t n, float scale, float* most) {
  const float factor = scale * LOG2_E;
  Floats high = splat(-INFINITY), sum = {};
  // scaled and rounded first: a fused multiply and subtract would give the largest logit a weight beside 1
  for (int64_t j = 0; j < n; j += LANES) {
    const Floats scaled = load(logits + j) * factor;
    store(logits + j, scaled);
    high = larger(scaled, high);
  }
  *most = largest_of(high);
  for (int64_t j = 0; j < n; j += LANES) {
    const Floats weight = exp2_of(load(logits + j) - *most);
    store(logits + j, weight);
    sum += weight;
  }
  return sum_of(sum);
}

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
    float* memory = static_cast<float*>(std::aligned_alloc(64, offset[7] * 4 * a.threads));
    if (!memory) throw std::bad_alloc();
    run_tasks(heads * parts, a.threads, [&](int64_t task, int thread) {
      const int64_t part = task % parts, first = blocks * part / parts, last = blocks * (part + 1) / parts;
      run_head(task / parts / a.H, task / parts % a.H, first * ROWS, last * ROWS, memory + thread * offset[7]);
    });
    std::free(memory);
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
      multiply_panels<Cells>(q, depth, k, depth, logits, keys);
      float scales[ROWS];
      for (int64_t r = 0; r < rows; ++r) {
        float* const l = logits + r * keys;
        for (int64_t j = a.Nk; j < keys; ++j) l[j] = -INFINITY;
        float most;
        const float sum = exponentiate(l, keys, a.scale, &most);
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
    const int64_t squares = a.D / Cells::numbers / LANES * LANES;
    for (int64_t j = 0; j < keys; j += LANES) {
      const Column column(j, keys, depth);
      Cell* const to = packed + column.start;
      for (int64_t c = 0; c < squares; c += LANES) {
        Floats cells[LANES];
        for (int64_t i = 0; i < LANES; ++i)
          cells[i] = j + i < a.Nk ? Cells::load_cells(at(a.k, b, j + i, h), c) : splat(0.0f);
        transpose(cells);
        for (int64_t i = 0; i < LANES; ++i) store_bits(to + (c + i) * column.step, cells[i]);
      }
      if (squares == depth) continue;
      for (int64_t i = 0; i < LANES; ++i) {
        if (j + i < a.Nk)
          Cells::from_row(at(a.k, b, j + i, h), a.D, row);
        else
          memset(row, 0, depth * 4);
        for (int64_t c = squares; c < depth; ++c) to[c * column.step + i] = row[c];
      }
    }
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

  void multiply_weights(float* memory, int64_t rows, const Cell* v, float* out) const {
    float* const logits = memory + offset[3];
    if constexpr (pairs) {
      Bf16* const weights = (Bf16*)(memory + offset[4]);
      for (int64_t j = 0; j < rows * keys; j += LANES) store(weights + j, load(logits + j));
      multiply_panels<Cells>((const Cell*)weights, keys / 2, v, key_depth, out, width);
    } else {
      multiply_panels<Cells>(logits, keys, v, key_depth, out, width);
    }
  }

  void write(T* to, const float* from, float scale) const {
    int64_t d = 0;
    for (; d + LANES <= a.D; d += LANES) store(to + d, load(from + d) * scale);
    if (d < a.D) store_part(to + d, load(from + d) * scale, a.D - d);
  }

  const AttentionArgs& a;
  const int64_t keys, width;        // Nk and D in whole vectors
  const int64_t depth, key_depth;   // cells in D and Nk numbers
  int64_t offset[8] = {};           // of k, v, q, logits, weights, out, row in a thread's workspace, and its size
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
