// Where each pixel of an image goes when it is cut into patches: the only index maths for patches, of host and device.
// All in int64: a batch of large images has more than 2^31 pixels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VITFAST_HOST_DEVICE __host__ __device__
#else
#define VITFAST_HOST_DEVICE
#endif

namespace vitfast {

// Order of a patch's pixels in its row: as a convolution's weight [D, C, ph, pw], or channels side by side.
enum class PatchOrder { chw, hwc };

// Images [B, C, H, W] of any strides -> rows [B, P + N, C * ph * pw]: N patches in row-major order after P rows for prefix
// tokens. The patches at the right and at the bottom may reach past the image.
struct PatchGeometry {
  int64_t C, H, W, ph, pw;
  int64_t P;
  PatchOrder order;
  int64_t image, channel, y, x;  // strides
};

struct Pixel {
  int64_t b, c, y, x;
};

struct RowColumn {
  int64_t row, column;  // row counts through all images
};

}  // namespace vitfast

// unnamed, as everything that is compiled once per instruction set: see simd.h
namespace {

using vitfast::PatchGeometry;
using vitfast::PatchOrder;
using vitfast::Pixel;
using vitfast::RowColumn;

VITFAST_HOST_DEVICE inline int64_t grid_height(const PatchGeometry& g) { return (g.H + g.ph - 1) / g.ph; }
VITFAST_HOST_DEVICE inline int64_t grid_width(const PatchGeometry& g) { return (g.W + g.pw - 1) / g.pw; }
VITFAST_HOST_DEVICE inline int64_t rows_per_image(const PatchGeometry& g) {
  return g.P + grid_height(g) * grid_width(g);
}
VITFAST_HOST_DEVICE inline int64_t columns(const PatchGeometry& g) { return g.C * g.ph * g.pw; }

// Row of the patch in row gy and column gx of the grid.
VITFAST_HOST_DEVICE inline int64_t row_of_patch(const PatchGeometry& g, int64_t b, int64_t gy, int64_t gx) {
  return b * rows_per_image(g) + g.P + gy * grid_width(g) + gx;
}

// Column of pixel (c, py, px) of a patch.
VITFAST_HOST_DEVICE inline int64_t column_in_patch(const PatchGeometry& g, int64_t c, int64_t py, int64_t px) {
  return g.order == PatchOrder::chw ? (c * g.ph + py) * g.pw + px : (py * g.pw + px) * g.C + c;
}

VITFAST_HOST_DEVICE inline RowColumn place_of(const PatchGeometry& g, const Pixel& p) {
  return {row_of_patch(g, p.b, p.y / g.ph, p.x / g.pw), column_in_patch(g, p.c, p.y % g.ph, p.x % g.pw)};
}

VITFAST_HOST_DEVICE inline bool is_prefix(const PatchGeometry& g, int64_t row) {
  return row % rows_per_image(g) < g.P;
}

// The inverse of place_of, for a row that is no prefix row. The pixel may lie in the padding, see in_image.
VITFAST_HOST_DEVICE inline Pixel pixel_at(const PatchGeometry& g, const RowColumn& at) {
  const int64_t patch = at.row % rows_per_image(g) - g.P, pixels = g.ph * g.pw;
  const bool chw = g.order == PatchOrder::chw;
  const int64_t c = chw ? at.column / pixels : at.column % g.C, in_patch = chw ? at.column % pixels : at.column / g.C;
  return {at.row / rows_per_image(g), c, patch / grid_width(g) * g.ph + in_patch / g.pw,
          patch % grid_width(g) * g.pw + in_patch % g.pw};
}

VITFAST_HOST_DEVICE inline bool in_image(const PatchGeometry& g, const Pixel& p) { return p.y < g.H && p.x < g.W; }

VITFAST_HOST_DEVICE inline int64_t offset_of(const PatchGeometry& g, const Pixel& p) {
  return p.b * g.image + p.c * g.channel + p.y * g.y + p.x * g.x;
}

}  // namespace
