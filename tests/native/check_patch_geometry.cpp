// Pixels <-> places in rows is a bijection for random sizes, patches, strides and prefixes, and nothing is out of
// range.
#include "shared/patch_geometry.h"

#include "random_layout.h"

// Kernels for GPUs count patches without prefix rows, take columns in chunks, and load several pixels at once.
void check_what_kernels_use(const PatchGeometry& g, int64_t B) {
  const int64_t N = grid_height(g) * grid_width(g);
  for (int64_t m = 0; m < B * N; ++m) {
    const Patch patch = patch_at(g, m);
    const int64_t row = row_of(g, patch.b, m);
    REQUIRE(row == patch.b * rows_per_image(g) + g.P + patch.number, "row %ld of patch %ld", (long)row, (long)m);
    const Pixel first = pixel_at(g, {row, 0});
    REQUIRE(first.b == patch.b && first.y == patch.y && first.x == patch.x, "patch %ld begins elsewhere", (long)m);
  }
  for (int32_t column = 0; column < columns(g); ++column) {
    const InPatch<int32_t> p = place_in_patch<int32_t>(g, column);
    REQUIRE(column_in_patch(g, p.c, p.y, p.x) == column, "column %d", column);
    if (g.order != PatchOrder::chw || column + 1 == columns(g)) continue;
    const InPatch<int32_t> next = after<int32_t>(g, p, 1);
    REQUIRE(column_in_patch(g, next.c, next.y, next.x) == column + 1, "after column %d", column);
  }
}

// What loads_together allows lies side by side, at an aligned address, in one line of one patch, inside or outside.
void check_loads(const PatchGeometry& g, int64_t B, int64_t bytes, int64_t side, int64_t step) {
  const uint64_t address = 64 + bytes * draw(0, 1);
  if (!loads_together(g, address, bytes, side, step)) return;
  const int64_t width = side * step * bytes < 16 ? side * step * bytes : 16;
  for (int64_t m = 0; m < B * grid_height(g) * grid_width(g); ++m)
    for (int64_t c = 0; c < (step == 1 ? g.C : 1); ++c)
      for (int64_t y = 0; y < g.ph; ++y)
        for (int64_t x = 0; x < g.pw; x += side) {
          const Patch patch = patch_at(g, m);
          const Pixel first{patch.b, c, patch.y + y, patch.x + x};
          const int64_t offset = offset_of(g, first);
          REQUIRE((address + offset * bytes) % width == 0, "offset %ld is not aligned to %ld", (long)offset,
                  (long)width);
          for (int64_t i = 0; i < side * step; ++i) {
            const Pixel p{first.b, c + i % step, first.y, first.x + i / step};
            REQUIRE(offset_of(g, p) == offset + i && in_image(g, p) == in_image(g, first), "pixel %ld of %ld", (long)i,
                    (long)side);
          }
        }
}

// Chunks of pixels whose channels are loaded together: each column once.
void check_interleaved_chunks() {
  for (int trial = 0; trial < 300; ++trial) {
    const int32_t side = CHUNK * static_cast<int32_t>(draw(1, 2)), pw = side * static_cast<int32_t>(draw(1, 3));
    const PatchGeometry g{.C = draw(1, 4),
                          .H = 1,
                          .W = 1,
                          .ph = draw(1, 4),
                          .pw = pw,
                          .P = 0,
                          .order = PatchOrder::chw,
                          .image = 0,
                          .channel = 0,
                          .y = 0,
                          .x = 0};
    std::vector<char> taken(columns(g));
    for (int32_t q = 0; q < columns(g) / CHUNK; ++q) {
      const int32_t column = column_of_interleaved_chunk<int32_t>(g, q, side);
      const InPatch<int32_t> p = place_in_patch<int32_t>(g, column);
      const int32_t of_channel = side / CHUNK, inside = q % (static_cast<int32_t>(g.C) * of_channel);
      REQUIRE(p.c == inside / of_channel && p.x % CHUNK == 0, "chunk %d: channel %d", q, p.c);
      for (int32_t i = 0; i < CHUNK; ++i) REQUIRE(!taken.at(column + i)++, "column %d twice", column + i);
    }
  }
}

void check_packed_images() {
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<PackedImage> images;
    int64_t patches = 0;
    for (int64_t n = draw(1, 9); n > 0; --n) {
      images.push_back({nullptr, patches, draw(1, 30), draw(1, 30), 900, 30, 1});
      patches += ((images.back().H + 3) / 4) * ((images.back().W + 4) / 5);
    }
    const PatchGeometry common{.C = 3,
                               .H = 0,
                               .W = 0,
                               .ph = 4,
                               .pw = 5,
                               .P = 2,
                               .order = PatchOrder::chw,
                               .image = 0,
                               .channel = 0,
                               .y = 0,
                               .x = 0};
    for (int64_t m = 0, b = 0; m < patches; ++m) {
      while (b + 1 < static_cast<int64_t>(images.size()) && images[b + 1].first <= m) ++b;
      REQUIRE(image_of(images.data(), images.size(), m) == b, "patch %ld", (long)m);
      const PatchGeometry g = geometry_of(common, images[b]);
      REQUIRE(m - images[b].first < grid_height(g) * grid_width(g), "patch %ld is not in image %ld", (long)m, (long)b);
    }
  }
}

int main() {
  check_interleaved_chunks();
  check_packed_images();
  int loads = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    const int64_t side = int64_t{1} << draw(0, 4), step = draw(0, 1) ? 1 : 3, bytes = int64_t{1} << draw(0, 2),
                  ph = draw(1, 4);
    const int64_t pw = side * draw(1, 2), C = step == 3 ? 3 : draw(1, 3), H = draw(1, 9);
    const int64_t W = draw(0, 3) ? side * draw(1, 4) : draw(1, 40);
    const int64_t gap = draw(0, 3) ? 0 : 16 * draw(0, 2) + draw(0, 1), line = W * step + gap, plane = H * line;
    const int64_t image = plane * (step == 3 ? 1 : C), channel = step == 3 ? 1 : plane;
    const PatchGeometry g{.C = C,
                          .H = H,
                          .W = W,
                          .ph = ph,
                          .pw = pw,
                          .P = 0,
                          .order = PatchOrder::chw,
                          .image = image,
                          .channel = channel,
                          .y = line,
                          .x = step};
    loads += loads_together(g, 0, bytes, side, step);
    check_loads(g, 2, bytes, side, step);
  }
  REQUIRE(loads > 300, "only %d layouts that load together", loads);
  for (int trial = 0; trial < 3000; ++trial) {
    const int64_t B = draw(1, 3);
    const std::vector<int64_t> sizes{B, draw(1, 5), draw(1, 12), draw(1, 12)};
    std::vector<int64_t> strides;
    const int64_t span = lay_out(sizes, random_order(4), draw(0, 1), strides);
    const PatchGeometry g{.C = sizes[1],
                          .H = sizes[2],
                          .W = sizes[3],
                          .ph = draw(1, 6),
                          .pw = draw(1, 6),
                          .P = draw(0, 3),
                          .order = draw(0, 1) ? PatchOrder::chw : PatchOrder::hwc,
                          .image = strides[0],
                          .channel = strides[1],
                          .y = strides[2],
                          .x = strides[3]};
    const int64_t H = grid_height(g) * g.ph, W = grid_width(g) * g.pw, N = grid_height(g) * grid_width(g);
    REQUIRE(H >= g.H && H < g.H + g.ph && W >= g.W && W < g.W + g.pw, "padded %ld x %ld", (long)H, (long)W);
    REQUIRE(rows_per_image(g) == g.P + N, "%ld rows", (long)rows_per_image(g));

    check_what_kernels_use(g, B);
    std::vector<char> taken(B * rows_per_image(g) * columns(g)), read(span);
    int64_t in_the_image = 0;
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c = 0; c < g.C; ++c)
        for (int64_t y = 0; y < H; ++y)
          for (int64_t x = 0; x < W; ++x) {
            const RowColumn at = place_of(g, {b, c, y, x});
            REQUIRE(at.row >= 0 && at.row < B * rows_per_image(g), "row %ld", (long)at.row);
            REQUIRE(at.column >= 0 && at.column < columns(g), "column %ld", (long)at.column);
            REQUIRE(!is_prefix(g, at.row), "row %ld", (long)at.row);
            char& place = taken.at(at.row * columns(g) + at.column);
            REQUIRE(!place, "row %ld column %ld twice", (long)at.row, (long)at.column);
            place = 1;
            const Pixel p = pixel_at(g, at);
            REQUIRE(p.b == b && p.c == c && p.y == y && p.x == x, "back to %ld %ld %ld %ld", (long)p.b, (long)p.c,
                    (long)p.y, (long)p.x);
            REQUIRE(in_image(g, p) == (y < g.H && x < g.W), "%ld %ld", (long)y, (long)x);
            if (!in_image(g, p)) continue;
            char& number = read.at(offset_of(g, p));
            REQUIRE(!number, "offset %ld twice", (long)offset_of(g, p));
            number = 1;
            ++in_the_image;
          }
    REQUIRE(in_the_image == B * g.C * g.H * g.W, "%ld pixels", (long)in_the_image);
    for (int64_t row = 0; row < B * rows_per_image(g); ++row)
      for (int64_t column = 0; column < columns(g); ++column)
        REQUIRE(taken[row * columns(g) + column] != is_prefix(g, row), "row %ld column %ld", (long)row, (long)column);
  }

  // more rows, columns and numbers than 32 bits count
  const PatchGeometry huge{
      3, int64_t{1} << 40, int64_t{1} << 20, 3, 5, 2, PatchOrder::hwc, int64_t{1} << 61, 1, int64_t{3} << 20, 3};
  const Pixel far{1, 2, huge.H - 1, huge.W - 1}, back = pixel_at(huge, place_of(huge, far));
  REQUIRE(back.b == far.b && back.c == far.c && back.y == far.y && back.x == far.x, "huge image");
  for (int64_t m : {int64_t{INT32_MAX} - 1, int64_t{INT32_MAX}, int64_t{1} << 40}) {
    const PatchGeometry g{.C = 3,
                          .H = 64,
                          .W = 80,
                          .ph = 16,
                          .pw = 16,
                          .P = 1,
                          .order = PatchOrder::chw,
                          .image = 0,
                          .channel = 0,
                          .y = 0,
                          .x = 0};
    const Patch patch = patch_at(g, m);
    REQUIRE(patch.b == m / 20 && patch.number == m % 20 && patch.y == m % 20 / 5 * 16 && patch.x == m % 5 * 16,
            "patch %ld", (long)m);
  }
  std::puts("ok");
}
