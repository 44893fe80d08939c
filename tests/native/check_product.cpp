// The product by turns of csrc/cuda/product.cuh, run on the host, beside plain loops in double: sizes that fill no tile
// and no stage, with and without a norm, memory that is exactly as large as it has to be. An argument is how many
// trials.
#include "cuda/product_launch.cuh"

#include "numbers_on_host.h"

using namespace vitfast;

namespace {

double activated(double x, int act) {
  if (act == 1) return x * std::erfc(-x / std::sqrt(2.0)) / 2;
  if (act == 2) return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  return x;
}

enum class Statistics { none, layer, rms, pieces, pieces_rms };

template <class P>
void check(DType dtype, int64_t M, int64_t N, int64_t K, Statistics statistics, int act) {
  const int64_t pieces = K % 3 == 0 ? 3 : 2, piece = K / pieces, x_row = K + 8 * draw(0, 2), weight_row = K;
  const bool norms = statistics != Statistics::none;
  const bool of_pieces = statistics == Statistics::pieces || statistics == Statistics::pieces_rms;
  const bool centred = statistics == Statistics::layer || statistics == Statistics::pieces;
  const double eps = 1e-5;
  Numbers x(dtype, (M - 1) * x_row + K), weight(dtype, N * weight_row), out(dtype, M * N), sums(DType::fp32, N);
  Numbers bias(DType::fp32, N), mean(DType::fp32, of_pieces ? pieces * 2 * M : M), rstd(DType::fp32, M);
  x.fill(1, 0.25), weight.fill(0.2), bias.fill(1);
  std::vector<double> means(M, 0), rstds(M, 1);
  for (int64_t n = 0; n < N; ++n) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += weight.at(n * weight_row + k);
    sums.put(n, sum);
  }
  for (int64_t m = 0; m < M; ++m) {
    const auto part = [&](int64_t from, int64_t count, bool square, double away) {
      double sum = 0;
      for (int64_t k = from; k < from + count; ++k)
        sum += square ? std::pow(x.at(m * x_row + k) - away, 2) : x.at(m * x_row + k);
      return sum;
    };
    if (norms && centred) means[m] = part(0, K, false, 0) / K;
    if (norms) rstds[m] = 1 / std::sqrt(part(0, K, true, means[m]) / K + eps);
    rstd.put(m, rstds[m]);
    if (!of_pieces) mean.put(m, means[m]);
    for (int64_t p = 0; of_pieces && p < pieces; ++p) {
      const double of_part = part(p * piece, piece, false, 0) / piece;
      mean.put((2 * p) * M + m, of_part), mean.put((2 * p + 1) * M + m, part(p * piece, piece, true, of_part));
    }
  }
  const auto floats = [](const Numbers& n) { return reinterpret_cast<const float*>(n.memory); };
  const ProductArgs args{.x = x.memory,
                         .M = M,
                         .K = K,
                         .x_row = x_row,
                         .weight = weight.memory,
                         .N = N,
                         .weight_row = weight_row,
                         .column_sums = norms ? floats(sums) : nullptr,
                         .bias = floats(bias),
                         .mean = norms && statistics != Statistics::rms ? floats(mean) : nullptr,
                         .rstd = norms && !of_pieces ? floats(rstd) : nullptr,
                         .pieces = of_pieces ? pieces : 0,
                         .centred = centred,
                         .eps = static_cast<float>(eps),
                         .out = out.memory,
                         .dtype = dtype,
                         .act = act,
                         .tile = 0,
                         .device = 0,
                         .stream = nullptr};
  REQUIRE((multiply_with<P>(args) == cudaSuccess), "it did not start");
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += x.at(m * x_row + k) * weight.at(n * weight_row + k);
      if (norms) sum = (sum - means[m] * sums.at(n)) * rstds[m];
      const double want = activated(sum + bias.at(n), act), got = out.at(m * N + n);
      REQUIRE(std::fabs(got - want) <= (dtype == DType::bf16 ? 5e-3 : 1e-3) * (0.2 + std::fabs(want)),
              "row %ld column %ld: %g, expected %g", (long)m, (long)n, got, want);
    }
}

// tiles smaller than the product's own, so that groups take several by turns
template <class T, int STAGES, int CLUSTER>
void check_small(DType dtype) {
  using P = ProductPlan<T, 64, 32, STAGES, CLUSTER>;
  on_host::gpu.multiprocessors = static_cast<int>(draw(1, 2)) * CLUSTER;
  on_host::gpu.copies_late = draw(0, 1);
  check<P>(dtype, draw(1, 400), 8 * draw(1, 12), 8 * draw(1, 60), static_cast<Statistics>(draw(0, 4)),
           static_cast<int>(draw(0, 2)));
}

}  // namespace

int main(int count, char** words) {
  for (int trial = 0; trial < (count > 1 ? std::atoi(words[1]) : 3); ++trial) {
    check_small<Bf16, 4, 1>(DType::bf16);
    check_small<Half, 4, 2>(DType::fp16);
    // every tile has more steps than there are stages, and its group's next one
    on_host::gpu.multiprocessors = 2, on_host::gpu.copies_late = trial % 2;
    check<ProductPlan<Bf16, 64, 32, 3, 2>>(DType::bf16, 300, 72, 264, Statistics::pieces, 1);
  }
  on_host::gpu.multiprocessors = 4;
  check<ProductPlan<Bf16, 128, 128, 4, 2>>(DType::bf16, 300, 264, 136, Statistics::layer, 1);
  check<ProductPlan<Half, 64, 256, 4, 2>>(DType::fp16, 150, 264, 72, Statistics::none, 2);
  std::puts("ok");
}
