// Images -> rows of pixels for the projection, see patch_geometry.h. A line is what lies side by side in the image and
// in runs also in the rows: a row of one channel for the order chw, a row of all channels for hwc.
#pragma once

#include <cstdlib>
#include <new>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "shared/patch_geometry.h"

namespace {

using vitfast::DType;
using vitfast::PatchRowsArgs;

// every step-th of n numbers; steps known to the compiler become shuffles
template <class T>
inline void gather_every(const T* from, int64_t step, int64_t n, T* to) {
  if (step == 3)
    for (int64_t i = 0; i < n; ++i) to[i] = from[3 * i];
  else
    for (int64_t i = 0; i < n; ++i) to[i] = from[step * i];
}

template <class From, class To, bool normalises>
class PatchRows {
 public:
  explicit PatchRows(const PatchRowsArgs& args)
      : a(args),
        g(a.geometry),
        chw(g.order == PatchOrder::chw),
        lines(chw ? g.C : 1),
        run(chw ? g.pw : g.pw * g.C),
        width(chw ? g.W : g.W * g.C),
        side_by_side(chw ? g.x == 1 : g.x == g.C && (g.C == 1 || g.channel == 1)),
        vectors((run + LANES - 1) / LANES) {}

  void rows() const {
    // scale and shift of every number in a run, and a line for each thread
    const int64_t constants = normalises ? lines * vectors * LANES : 0, line = side_by_side ? 0 : width;
    char* memory = static_cast<char*>(std::malloc(2 * constants * sizeof(float) + a.threads * line * sizeof(From) + 1));
    if (!memory) throw std::bad_alloc();
    float *const scale = (float*)memory, *const shift = scale + constants;
    From* const copies = (From*)(shift + constants);
    for (int64_t i = 0; i < constants; ++i) {
      const int64_t c = chw ? i / (vectors * LANES) : i % g.C;
      scale[i] = a.scale[c];
      shift[i] = a.shift[c];
    }
    run_tasks(a.B * grid_height(g), a.threads, [&](int64_t task, int thread) {
      row_of_grid(task / grid_height(g), task % grid_height(g), scale, shift, copies + thread * line);
    });
    std::free(memory);
  }

 private:
  void row_of_grid(int64_t b, int64_t gy, const float* scale, const float* shift, From* copy) const {
    const int64_t K = columns(g), patches = grid_width(g), height = g.H - gy * g.ph < g.ph ? g.H - gy * g.ph : g.ph;
    To* const first = (To*)a.rows + row_of_patch(g, b, gy, 0) * K;
    if (gy == 0) memset(first - g.P * K, 0, g.P * K * sizeof(To));
    const bool padded = height < g.ph || g.W % g.pw;
    if (padded) memset(first, 0, patches * K * sizeof(To));
    for (int64_t l = 0; l < lines; ++l) {
      for (int64_t py = 0; py < height; ++py) {
        const From* const line = line_of({b, l, gy * g.ph + py, 0}, copy);
        const int64_t column = column_in_patch(g, l, py, 0);
        for (int64_t gx = 0; gx < patches; ++gx) {
          const int64_t start = gx * run, left = width - start, n = left < run ? left : run;
          // past its end a run may spill over columns that are written later
          convert(line + start, left, first + gx * K + column, padded ? n : K - column, n, scale + l * vectors * LANES,
                  shift + l * vectors * LANES);
        }
      }
    }
  }

  const From* line_of(const Pixel& start, From* copy) const {
    const From* const from = (const From*)a.images + offset_of(g, start);
    if (side_by_side) return from;
    if (chw)
      gather_every(from, g.x, g.W, copy);
    else
      for (int64_t x = 0; x < g.W; ++x)
        for (int64_t c = 0; c < g.C; ++c) copy[x * g.C + c] = from[x * g.x + c * g.channel];
    return copy;
  }

  // n numbers, by whole vectors where these fit into what may be read and written
  static void convert(const From* from, int64_t readable, To* to, int64_t writable, int64_t n, const float* scale,
                      const float* shift) {
    for (int64_t i = 0; i < n; i += LANES) {
      const int64_t part = n - i < LANES ? n - i : LANES;
      Floats v = i + LANES <= readable ? load(from + i) : load_part(from + i, part);
      if constexpr (normalises) v = v * load(scale + i) + load(shift + i);
      if (i + LANES <= writable)
        store(to + i, v);
      else
        store_part(to + i, v, part);
    }
  }

  const PatchRowsArgs& a;
  const PatchGeometry& g;
  const bool chw;
  const int64_t lines, run, width;
  const bool side_by_side;
  const int64_t vectors;
};

template <class From, bool normalises>
inline void patch_rows_from(const PatchRowsArgs& args) {
  if (args.to == DType::fp32) return PatchRows<From, float, normalises>(args).rows();
  if (args.to == DType::bf16) return PatchRows<From, Bf16, normalises>(args).rows();
  PatchRows<From, Fp16, normalises>(args).rows();
}

inline void patch_rows(const PatchRowsArgs& args) {
  switch (args.from) {
    case DType::fp32: return patch_rows_from<float, false>(args);
    case DType::bf16: return patch_rows_from<Bf16, false>(args);
    case DType::fp16: return patch_rows_from<Fp16, false>(args);
    case DType::uint8: return args.scale ? patch_rows_from<uint8_t, true>(args) : patch_rows_from<uint8_t, false>(args);
  }
}

}  // namespace
