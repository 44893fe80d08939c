// Where each pixel of an image goes when it is cut into patches: the only index maths for patches, of host and device.
// All in int64: a batch of large images has more than 2^31 pixels.
#pragma once

#include <array>
#include <cstdint>

#ifdef __CUDACC__
#define VITFAST_HOST_DEVICE __host__ __device__
#else
#define VITFAST_HOST_DEVICE
#endif

namespace vitfast {

// Order of a patch's pixels in its row: as a convolution's weight [D, C, ph, pw], or channels side by side.
enum class PatchOrder { chw, hwc };

// Images [B, C, H, W] of any strides -> rows [B, P + N, C * ph * pw]: N patches in row-major order after P rows for
// prefix tokens. The patches at the right and at the bottom may reach past the image.
struct PatchGeometry {
  int64_t C, H, W, ph, pw;
  int64_t P;
  PatchOrder order;
  int64_t image, channel, y, x;  // strides
};

// As Python gives it: shape and strides of images [B, C, H, W]; patch: ph, pw.
inline PatchGeometry patch_geometry(const std::array<int64_t, 4>& shape, const std::array<int64_t, 4>& strides,
                                    const std::array<int64_t, 2>& patch, int64_t P, int order) {
  return {.C = shape[1],
          .H = shape[2],
          .W = shape[3],
          .ph = patch[0],
          .pw = patch[1],
          .P = P,
          .order = static_cast<PatchOrder>(order),
          .image = strides[0],
          .channel = strides[1],
          .y = strides[2],
          .x = strides[3]};
}

struct Pixel {
  int64_t b, c, y, x;
};

struct RowColumn {
  int64_t row, column;  // row counts through all images
};

// A patch: its number in its image, and the image's pixel that is its first.
struct Patch {
  int64_t b, number, y, x;
};

// A pixel's place in its patch.
template <class Int>
struct InPatch {
  Int c, y, x;
};

// One of several images of different sizes, whose patches follow each other.
struct PackedImage {
  const void* data;
  int64_t first;  // patches of the images before it
  int64_t H, W;
  int64_t channel, y, x;  // strides
};

}  // namespace vitfast

// unnamed, as everything that is compiled once per instruction set: see simd.h
namespace {

using vitfast::InPatch;
using vitfast::PackedImage;
using vitfast::Patch;
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

VITFAST_HOST_DEVICE inline bool is_prefix(const PatchGeometry& g, int64_t row) { return row % rows_per_image(g) < g.P; }

VITFAST_HOST_DEVICE inline Patch patch_of(const PatchGeometry& g, int64_t b, int64_t number) {
  return {b, number, number / grid_width(g) * g.ph, number % grid_width(g) * g.pw};
}

// The inverse of column_in_patch. Int: int64_t, or what divides faster and holds columns(g).
template <class Int>
VITFAST_HOST_DEVICE inline InPatch<Int> place_in_patch(const PatchGeometry& g, Int column) {
  const Int C = static_cast<Int>(g.C), ph = static_cast<Int>(g.ph), pw = static_cast<Int>(g.pw);
  if (g.order == PatchOrder::chw) {
    const Int line = column / pw;
    return {line / ph, line % ph, column % pw};
  }
  const Int pixel = column / C;
  return {column % C, pixel / pw, pixel % pw};
}

// The pixel whose column is the next one of the order chw.
template <class Int>
VITFAST_HOST_DEVICE inline InPatch<Int> after(const PatchGeometry& g, InPatch<Int> p, Int pixels) {
  p.x += pixels;
  if (p.x < static_cast<Int>(g.pw)) return p;
  p.x = 0;
  if (++p.y < static_cast<Int>(g.ph)) return p;
  return {p.c + 1, 0, 0};
}

// The inverse of place_of, for a row that is no prefix row. The pixel may lie in the padding, see in_image.
VITFAST_HOST_DEVICE inline Pixel pixel_at(const PatchGeometry& g, const RowColumn& at) {
  const Patch patch = patch_of(g, at.row / rows_per_image(g), at.row % rows_per_image(g) - g.P);
  const InPatch<int64_t> place = place_in_patch(g, at.column);
  return {patch.b, place.c, patch.y + place.y, patch.x + place.x};
}

VITFAST_HOST_DEVICE inline bool in_image(const PatchGeometry& g, const Pixel& p) { return p.y < g.H && p.x < g.W; }

VITFAST_HOST_DEVICE inline int64_t offset_of(const PatchGeometry& g, const Pixel& p) {
  return p.b * g.image + p.c * g.channel + p.y * g.y + p.x * g.x;
}

// Patch m of all images, counted without prefix rows. A GPU divides by 32 bits in a fraction of the time.
VITFAST_HOST_DEVICE inline Patch patch_at(const PatchGeometry& g, int64_t m) {
  const int64_t width = grid_width(g), N = grid_height(g) * width;
  if (m >= INT32_MAX || N >= INT32_MAX) return patch_of(g, m / N, m % N);
  const uint32_t b = static_cast<uint32_t>(m) / static_cast<uint32_t>(N);
  const uint32_t number = static_cast<uint32_t>(m) % static_cast<uint32_t>(N), across = static_cast<uint32_t>(width);
  return {b, number, number / across * g.ph, number % across * g.pw};
}

// Row of patch m, which belongs to image b.
VITFAST_HOST_DEVICE inline int64_t row_of(const PatchGeometry& g, int64_t b, int64_t m) { return m + (b + 1) * g.P; }

// Which of `count` images patch m belongs to.
VITFAST_HOST_DEVICE inline int64_t image_of(const PackedImage* images, int64_t count, int64_t m) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (images[middle].first <= m ? low : high) = middle;
  }
  return low;
}

// The geometry of one packed image; `common` has what they share.
VITFAST_HOST_DEVICE inline PatchGeometry geometry_of(const PatchGeometry& common, const PackedImage& image) {
  PatchGeometry g = common;
  g.H = image.H, g.W = image.W;
  g.image = 0, g.channel = image.channel, g.y = image.y, g.x = image.x;
  return g;
}

// Kernels for GPUs read a row in chunks of so many columns: 16 bytes in half precision.
constexpr int CHUNK = 8;

// Whether `side` numbers of `bytes` each can be loaded at once wherever they begin at a multiple of `side` in a line of
// a patch: they are in one line, all inside the image or none, and at an address that a load of up to 16 bytes may
// have. `step` is how far pixels lie apart: 1, or C where the channels of a pixel lie side by side.
VITFAST_HOST_DEVICE inline bool loads_together(const PatchGeometry& g, uint64_t address, int64_t bytes, int64_t side,
                                               int64_t step) {
  const int64_t width = side * step * bytes < 16 ? side * step * bytes : 16;
  const bool interleaved = step != 1;
  if (side * step * bytes % width) return false;
  if (g.pw % side || g.W % side || g.x != step || (interleaved && (g.channel != 1 || g.C != step))) return false;
  const int64_t between = interleaved ? 0 : g.channel;
  return !(address % width || g.image * bytes % width || g.y * bytes % width || between * bytes % width);
}

// Where the channels of `side` pixels are loaded together, chunks come in another order than columns: lines of a patch,
// in these groups of `side` pixels, in these channels, in these chunks. The column at which chunk `q` begins.
template <class Int>
VITFAST_HOST_DEVICE inline Int column_of_interleaved_chunk(const PatchGeometry& g, Int q, Int side) {
  const Int of_channel = side / CHUNK, of_group = static_cast<Int>(g.C) * of_channel;
  const Int groups = static_cast<Int>(g.pw) / side, group = q / of_group, inside = q % of_group;
  const Int c = inside / of_channel, x = group % groups * side + inside % of_channel * CHUNK;
  return (c * static_cast<Int>(g.ph) + group / groups) * static_cast<Int>(g.pw) + x;
}

}  // namespace
