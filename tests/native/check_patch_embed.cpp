// The kernels of patch embedding, run on the host, beside plain loops in double: random sizes, patches, strides and
// number types, with memory that is exactly as large as it has to be. A few of each kind: every reader of pixels, every
// way to multiply. An argument is how many trials.
#include "cuda/patch_launch.cuh"

#include "numbers_on_host.h"

using namespace vitfast;

namespace {

struct Case {
  PatchGeometry g;
  int64_t B, D, span;
  DType from;
};

// `side`: a multiple of the patch's width and of the image's; `channels` at least; channels side by side or apart
Case drawn(DType from, int64_t side, bool interleaved, bool any_layout) {
  Case c;
  const int64_t pw = side * draw(1, side == 1 ? 6 : 2), ph = draw(1, 14), gw = draw(1, 5), gh = draw(1, 4);
  const int64_t cut_x = draw(0, 1) ? side * draw(0, pw / side - 1) : 0;
  c.B = draw(1, 3), c.D = draw(0, 1) ? 8 * draw(1, 20) : draw(1, 90), c.from = from;
  const std::vector<int64_t> sizes{c.B, interleaved ? 3 : draw(1, 3), gh * ph - draw(0, ph - 1), gw * pw - cut_x};
  std::vector<int64_t> strides;
  if (any_layout) {
    c.span = lay_out(sizes, random_order(4), draw(0, 1), strides);
  } else {
    c.span = lay_out(sizes, interleaved ? std::vector<int>{1, 3, 2, 0} : std::vector<int>{3, 2, 1, 0}, false, strides);
  }
  const int64_t P = draw(0, 2);
  c.g = {.C = sizes[1],
         .H = sizes[2],
         .W = sizes[3],
         .ph = ph,
         .pw = pw,
         .P = P,
         .order = PatchOrder::chw,
         .image = strides[0],
         .channel = strides[1],
         .y = strides[2],
         .x = strides[3]};
  return c;
}

template <class Product, class Pixels>
void check(const Case& c, DType dtype, DType to) {
  const PatchGeometry& g = c.g;
  const int64_t N = grid_height(g) * grid_width(g), K = columns(g), P = g.P;
  Numbers images(c.from, c.span), weight(dtype, c.D * K), bias(dtype, c.D), positions(DType::fp32, N * c.D);
  Numbers prefix(dtype, P * c.D), mean(DType::fp32, g.C), std(DType::fp32, g.C), tokens(to, c.B * (P + N) * c.D);
  images.fill(1), weight.fill(0.2), bias.fill(1), positions.fill(1), prefix.fill(1), mean.fill(0.5);
  for (int64_t i = 0; i < g.C; ++i)
    reinterpret_cast<float*>(std.memory)[i] = 0.25f + 0.125f * static_cast<float>(i % 3);
  const bool normalises = c.from == DType::uint8;
  const float* const m = normalises ? reinterpret_cast<float*>(mean.memory) : nullptr;
  const float* const s = normalises ? reinterpret_cast<float*>(std.memory) : nullptr;
  const ImagesArgs given{.geometry = g,
                         .data = images.memory,
                         .B = c.B,
                         .dtype = c.from,
                         .mean = m,
                         .std = s,
                         .packed = {},
                         .packed_on_device = nullptr,
                         .patches = c.B * N};
  const PatchEmbedArgs args{.images = given,
                            .weight = weight.memory,
                            .bias = bias.memory,
                            .D = c.D,
                            .dtype = dtype,
                            .positions = positions.memory,
                            .positions_dtype = DType::fp32,
                            .prefix = P ? prefix.memory : nullptr,
                            .prefix_image = 0,
                            .prefix_positions = nullptr,
                            .prefix_dtype = dtype,
                            .tokens = tokens.memory,
                            .tokens_dtype = to,
                            .tile = 0,
                            .device = 0,
                            .stream = nullptr};
  REQUIRE((embed_with<Product, Pixels>(args, embedding_of(args)) == cudaSuccess), "it did not start");

  const double eps = to == DType::fp32 && dtype == DType::fp32 ? 1e-5 : dtype == DType::bf16 ? 2e-2 : 3e-3;
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t n = 0; n < P + N; ++n)
      for (int64_t d = 0; d < c.D; ++d) {
        double sum = n < P ? prefix.at(n * c.D + d) : bias.at(d) + positions.at((n - P) * c.D + d);
        for (int64_t k = 0; n >= P && k < K; ++k) {
          const Pixel p = pixel_at(g, {b * rows_per_image(g) + n, k});
          if (!in_image(g, p)) continue;
          double x = images.at(offset_of(g, p));
          if (normalises) x = (x / 255 - m[p.c]) / s[p.c];
          sum += x * weight.at(d * K + k);
        }
        const double got = tokens.at((b * (P + N) + n) * c.D + d);
        REQUIRE(std::fabs(got - sum) <= eps * (2 + std::fabs(sum)), "image %ld token %ld column %ld: %g, expected %g",
                (long)b, (long)n, (long)d, got, sum);
      }
}

template <class T, class Pixels>
void check_gradient(const Case& c, DType dtype) {
  const PatchGeometry& g = c.g;
  const int64_t N = grid_height(g) * grid_width(g), K = columns(g), splits = draw(1, 3);
  Numbers images(c.from, c.span), grad(dtype, c.B * (g.P + N) * c.D), parts(DType::fp32, splits * c.D * K),
      sum(dtype, c.D * K);
  images.fill(1), grad.fill(0.2);
  const ImagesArgs given{.geometry = g,
                         .data = images.memory,
                         .B = c.B,
                         .dtype = c.from,
                         .mean = nullptr,
                         .std = nullptr,
                         .packed = {},
                         .packed_on_device = nullptr,
                         .patches = c.B * N};
  float* const partial = reinterpret_cast<float*>(parts.memory);
  const WeightGradientArgs args{.images = given,
                                .grad = grad.memory,
                                .D = c.D,
                                .dtype = dtype,
                                .parts = partial,
                                .splits = splits,
                                .weight_grad = sum.memory,
                                .device = 0,
                                .stream = nullptr};
  REQUIRE((gradient_with<T, Pixels>(args, gradient_of(args)) == cudaSuccess), "it did not start");
  for (int64_t d = 0; d < c.D; ++d)
    for (int64_t k = 0; k < K; ++k) {
      double total = 0, size = 0;
      for (int64_t m = 0; m < c.B * N; ++m) {
        const int64_t row = row_of(g, m / N, m);
        const Pixel p = pixel_at(g, {row, k});
        const double term = in_image(g, p) ? grad.at(row * c.D + d) * images.at(offset_of(g, p)) : 0;
        total += term, size += std::fabs(term);
      }
      const double got = sum.at(d * K + k);
      REQUIRE(std::fabs(got - total) <= (dtype == DType::bf16 ? 1e-2 : 2e-3) * (std::fabs(total) + 1e-3 * size) + 1e-6,
              "gradient %ld %ld: %g, expected %g", (long)d, (long)k, got, total);
    }
}

template <class T, class Product>
void check_all(DType dtype) {
  const auto to = [&] { return draw(0, 1) ? dtype : DType::fp32; };
  check<Product, PlanarPixels<uint8_t, T, Product::ROWS, Product::THREADS>>(drawn(DType::uint8, 16, false, false),
                                                                            dtype, to());
  check<Product, PlanarPixels<T, T, Product::ROWS, Product::THREADS>>(drawn(dtype, 8, false, false), dtype, to());
  check<Product, InterleavedPixels<uint8_t, T, Product::ROWS, Product::THREADS>>(drawn(DType::uint8, 16, true, false),
                                                                                 dtype, to());
  const DType any = std::vector<DType>{DType::uint8, DType::fp16, DType::bf16, DType::fp32}[draw(0, 3)];
  check<Product, ScatteredPixels<T, Product::ROWS, Product::THREADS>>(drawn(any, draw(1, 2), false, true), dtype, to());
}

}  // namespace

int main(int count, char** words) {
  for (int trial = 0; trial < (count > 1 ? std::atoi(words[1]) : 3); ++trial) {
    check_all<Half, WarpProduct<Half, 64, 64, 2, 2>>(DType::fp16);
    check_all<Bf16, GroupProduct<Bf16>>(DType::bf16);
    check_gradient<Half, PlanarPixels<Half, Half, 32, 256>>(drawn(DType::fp16, 8, false, false), DType::fp16);
    check_gradient<Bf16, InterleavedPixels<uint8_t, Bf16, 32, 256>>(drawn(DType::uint8, 16, true, false), DType::bf16);
    check_gradient<Half, ScatteredPixels<Half, 32, 256>>(drawn(DType::uint8, 1, false, true), DType::fp16);
    check<FloatProduct, ScatteredPixels<float, 64, 128>>(drawn(DType::fp32, 4, false, true), DType::fp32, DType::fp32);
  }
  std::puts("ok");
}
