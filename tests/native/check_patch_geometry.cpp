// Pixels <-> places in rows is a bijection for random sizes, patches, strides and prefixes, and nothing is out of range.
#include "patch_geometry.h"

#include "random_layout.h"

int main() {
  for (int trial = 0; trial < 3000; ++trial) {
    const int64_t B = draw(1, 3);
    const std::vector<int64_t> sizes{B, draw(1, 5), draw(1, 12), draw(1, 12)};
    std::vector<int64_t> strides;
    const int64_t span = lay_out(sizes, random_order(4), draw(0, 1), strides);
    const PatchGeometry g{sizes[1], sizes[2], sizes[3], draw(1, 6), draw(1, 6), draw(0, 3),
                          draw(0, 1) ? PatchOrder::chw : PatchOrder::hwc,
                          strides[0], strides[1], strides[2], strides[3]};
    const int64_t H = grid_height(g) * g.ph, W = grid_width(g) * g.pw, N = grid_height(g) * grid_width(g);
    REQUIRE(H >= g.H && H < g.H + g.ph && W >= g.W && W < g.W + g.pw, "padded %ld x %ld", (long)H, (long)W);
    REQUIRE(rows_per_image(g) == g.P + N, "%ld rows", (long)rows_per_image(g));

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
  const PatchGeometry huge{3, int64_t{1} << 40, int64_t{1} << 20, 3, 5, 2, PatchOrder::hwc, int64_t{1} << 61, 1,
                           int64_t{3} << 20, 3};
  const Pixel far{1, 2, huge.H - 1, huge.W - 1}, back = pixel_at(huge, place_of(huge, far));
  REQUIRE(back.b == far.b && back.c == far.c && back.y == far.y && back.x == far.x, "huge image");
  std::puts("ok");
}
