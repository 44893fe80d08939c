// The kernel patch_rows against a loop over patch_geometry.h, on buffers of exactly the size it may touch.
#include "cpu/kernels.h"

#include <cstring>

#include "random_layout.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

using namespace vitfast;

static int64_t size_of(DType dtype) { return dtype == DType::fp32 ? 4 : dtype == DType::uint8 ? 1 : 2; }

// All numbers here are multiples of 1/2 below 64, which every dtype but uint8 (whole numbers) holds exactly.
static void write(void* data, int64_t i, DType dtype, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::uint8) static_cast<uint8_t*>(data)[i] = value;
  if (dtype == DType::fp32) static_cast<float*>(data)[i] = value;
  if (dtype == DType::bf16) static_cast<uint16_t*>(data)[i] = bits >> 16;
  if (dtype == DType::fp16)
    static_cast<uint16_t*>(data)[i] =
        value == 0 ? 0 : (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13;
}

int main() {
  const DType dtypes[] = {DType::fp32, DType::bf16, DType::fp16, DType::uint8};
  for (int trial = 0; trial < 3000; ++trial) {
    const int64_t B = draw(1, 2), C = draw(1, 5), ph = draw(1, 4), pw = draw(1, 40);
    const bool pad = draw(0, 2) == 0;
    const std::vector<int64_t> sizes{B, C, pad ? draw(1, 9) : ph * draw(1, 3), pad ? draw(1, 90) : pw * draw(1, 4)};
    // half of the layouts are the two that networks use
    const int layout = draw(0, 3);
    const std::vector<int> nchw{3, 2, 1, 0}, nhwc{1, 3, 2, 0};
    std::vector<int64_t> strides;
    const int64_t span = lay_out(sizes, layout == 0 ? nchw : layout == 1 ? nhwc : random_order(4), draw(0, 1), strides);
    if (layout == 3) strides[draw(0, 3)] = 0;  // expanded
    PatchRowsArgs args{};
    const int64_t P = draw(0, 2);
    const PatchOrder order = draw(0, 1) ? PatchOrder::chw : PatchOrder::hwc;
    const PatchGeometry g{.C = C,
                          .H = sizes[2],
                          .W = sizes[3],
                          .ph = ph,
                          .pw = pw,
                          .P = P,
                          .order = order,
                          .image = strides[0],
                          .channel = strides[1],
                          .y = strides[2],
                          .x = strides[3]};
    args.geometry = g;
    args.B = B;
    args.from = dtypes[draw(0, 3)];
    args.to = dtypes[draw(0, 2)];
    args.threads = draw(1, 3);
    std::vector<float> scale(C), shift(C), pixels(span);
    const bool normalises = args.from == DType::uint8 && draw(0, 1);
    for (int64_t c = 0; c < C; ++c) {
      scale[c] = normalises && c % 2 ? 0.5f : 1.0f;
      shift[c] = normalises ? c - 1 : 0;
    }
    args.scale = normalises ? scale.data() : nullptr;
    args.shift = normalises ? shift.data() : nullptr;

    // an expanded image ends earlier
    int64_t end = 1;
    for (int i = 0; i < 4; ++i) end += (sizes[i] - 1) * strides[i];
    std::vector<uint8_t> images(end * size_of(args.from));
    for (int64_t i = 0; i < end; ++i) write(images.data(), i, args.from, pixels[i] = draw(0, 50));

    const int64_t rows = B * rows_per_image(g);
    std::vector<uint8_t> expected(rows * columns(g) * size_of(args.to)), got(expected.size(), 0xff);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < columns(g); ++column) {
        if (is_prefix(g, row)) continue;
        const Pixel p = pixel_at(g, {row, column});
        if (in_image(g, p))
          write(expected.data(), row * columns(g) + column, args.to, pixels[offset_of(g, p)] * scale[p.c] + shift[p.c]);
      }
    args.images = images.data();
    args.rows = got.data();
    JOIN(kernels_, VITFAST_ISA).patch_rows(args);
    for (size_t i = 0; i < got.size(); ++i) {
      const int64_t at = i / size_of(args.to);
      REQUIRE(got[i] == expected[i],
              "trial %d row %ld column %ld: C %ld H %ld W %ld ph %ld pw %ld P %ld order %d from %d to %d", trial,
              (long)(at / columns(g)), (long)(at % columns(g)), (long)C, (long)g.H, (long)g.W, (long)ph, (long)pw,
              (long)g.P, (int)g.order, (int)args.from, (int)args.to);
    }
  }
  std::puts("ok");
}
