// All kernels but patch rows against plain loops in double, on buffers of exactly the size they may touch. An argument
// is of how many trials one is done.
#include "cpu/kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "random_layout.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

using namespace vitfast;

static int share = 1;

// fp32 or bf16, whose conversions need no more than shifts
static float rounded(float x, DType dtype) {
  if (dtype == DType::fp32) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0xffff0000;
  std::memcpy(&x, &bits, 4);
  return x;
}
static void write(void* data, int64_t i, DType dtype, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == DType::fp32)
    static_cast<float*>(data)[i] = x;
  else
    static_cast<uint16_t*>(data)[i] = bits >> 16;
}
static double read(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::fp32) return static_cast<const float*>(data)[i];
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(data)[i]} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

static float normal() { return std::normal_distribution<float>()(generator); }

// [B, N, H, D] with D side by side and the rest anywhere, NaN in the gaps
struct Heads {
  std::vector<uint8_t> bytes;
  std::vector<int64_t> strides;
  HeadsView view;
  DType dtype;

  Heads(int64_t B, int64_t N, int64_t H, int64_t D, DType dtype) : dtype(dtype) {
    const std::vector<int64_t> sizes{B, N, H};
    lay_out(sizes, random_order(3), draw(0, 1), strides);
    const int64_t step = D + draw(0, 2);
    int64_t end = D;
    for (int i = 0; i < 3; ++i) end += (sizes[i] - 1) * (strides[i] *= step);
    bytes.resize(end * (dtype == DType::fp32 ? 4 : 2));
    for (int64_t i = 0; i < end; ++i) write(bytes.data(), i, dtype, NAN);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t n = 0; n < N; ++n)
        for (int64_t h = 0; h < H; ++h)
          for (int64_t d = 0; d < D; ++d)
            write(bytes.data(), b * strides[0] + n * strides[1] + h * strides[2] + d, dtype, rounded(normal(), dtype));
    view = {.data = bytes.data(), .image = strides[0], .token = strides[1], .head = strides[2]};
  }
  double at(int64_t b, int64_t n, int64_t h, int64_t d) const {
    return read(bytes.data(), b * strides[0] + n * strides[1] + h * strides[2] + d, dtype);
  }
};

static void check_attention() {
  for (int trial = 0; trial < 250 / share; ++trial) {
    const DType dtype = trial % 2 ? DType::bf16 : DType::fp32;
    const int64_t B = draw(1, 2), H = draw(1, 3), Nq = draw(1, 40), Nk = draw(1, 70), D = draw(1, 80);
    const Heads q(B, Nq, H, D, dtype), k(B, Nk, H, D, dtype), v(B, Nk, H, D, dtype);
    const bool with_lse = draw(0, 1);
    std::vector<uint8_t> out(B * Nq * H * D * (dtype == DType::fp32 ? 4 : 2));
    std::vector<float> lse(B * H * Nq);
    const float scale = trial % 9 ? 1 / std::sqrt(float(D)) : draw(-1, 0) * 0.1f;
    JOIN(kernels_, VITFAST_ISA)
        .attention({.q = q.view,
                    .k = k.view,
                    .v = v.view,
                    .out = out.data(),
                    .lse = with_lse ? lse.data() : nullptr,
                    .B = B,
                    .H = H,
                    .Nq = Nq,
                    .Nk = Nk,
                    .D = D,
                    .scale = scale,
                    .dtype = dtype,
                    .threads = int(draw(1, 3))});
    for (int64_t b = 0; b < B; ++b)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t i = 0; i < Nq; ++i) {
          std::vector<double> weights(Nk);
          double most = -INFINITY, sum = 0;
          for (int64_t j = 0; j < Nk; ++j) {
            double logit = 0;
            for (int64_t d = 0; d < D; ++d) logit += q.at(b, i, h, d) * k.at(b, j, h, d);
            most = std::max(most, weights[j] = logit * scale);
          }
          for (double& weight : weights) sum += weight = std::exp(weight - most);
          const double eps = dtype == DType::fp32 ? 2e-6 : 0.02;
          if (with_lse) {
            const double got = lse[(b * H + h) * Nq + i], expected = most + std::log(sum);
            REQUIRE(std::abs(got - expected) < 1e-5, "lse %g, expected %g", got, expected);
          }
          for (int64_t d = 0; d < D; ++d) {
            double expected = 0;
            for (int64_t j = 0; j < Nk; ++j) expected += weights[j] / sum * v.at(b, j, h, d);
            const double got = read(out.data(), ((b * Nq + i) * H + h) * D + d, dtype);
            REQUIRE(std::abs(got - expected) < eps * (1 + std::abs(expected)),
                    "Nq %ld Nk %ld D %ld dtype %d: %g at query %ld, %ld, expected %g", (long)Nq, (long)Nk, (long)D,
                    (int)dtype, got, (long)i, (long)d, expected);
          }
        }
  }
}

static double activated(double x, Act act) {
  switch (act) {
    case Act::gelu: return x * std::erfc(-x / std::sqrt(2.0)) / 2;
    case Act::gelu_tanh: return x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))) / 2;
    case Act::quick_gelu: return x / (1 + std::exp(-1.702 * x));
    default: return x / (1 + std::exp(-x));
  }
}

static void check_activations() {
  for (int trial = 0; trial < 400 / share; ++trial) {
    const DType dtype = trial % 2 ? DType::bf16 : DType::fp32;
    const Act act = static_cast<Act>(draw(0, 3));
    const int64_t n = trial % 50 ? draw(0, 100) : draw(16000, 40000);
    std::vector<uint8_t> x(n * (dtype == DType::fp32 ? 4 : 2)), y(x.size());
    const float range = draw(0, 4) ? 4 : 200;
    for (int64_t i = 0; i < n; ++i) write(x.data(), i, dtype, rounded(range * normal(), dtype));
    const bool in_place = draw(0, 1);
    const std::vector<uint8_t> from = x;
    JOIN(kernels_, VITFAST_ISA).activation(x.data(), in_place ? x.data() : y.data(), n, dtype, act, int(draw(1, 3)));
    for (int64_t i = 0; i < n; ++i) {
      const double in = read(from.data(), i, dtype), expected = activated(in, act);
      const double got = read(in_place ? x.data() : y.data(), i, dtype);
      const double bound = 3e-6 + (dtype == DType::fp32 ? 1e-6 : 0.004) * std::abs(expected);
      REQUIRE(std::abs(got - expected) <= bound, "act %d of %g is %g, expected %g", (int)act, in, got, expected);
    }
  }
}

static void check_layer_norm() {
  for (int trial = 0; trial < 200 / share; ++trial) {
    const DType dtype = trial % 2 ? DType::bf16 : DType::fp32;
    const int64_t rows = draw(1, 40), D = draw(1, 200), size = dtype == DType::fp32 ? 4 : 2;
    std::vector<uint8_t> x(rows * D * size), y(x.size()), weight(D * size), bias(D * size);
    for (int64_t i = 0; i < rows * D; ++i) write(x.data(), i, dtype, rounded(5 + 3 * normal(), dtype));
    for (int64_t i = 0; i < D; ++i) {
      write(weight.data(), i, dtype, rounded(normal(), dtype));
      write(bias.data(), i, dtype, rounded(normal(), dtype));
    }
    const bool affine = draw(0, 2);
    JOIN(kernels_, VITFAST_ISA)
        .layer_norm({.x = x.data(),
                     .y = y.data(),
                     .weight = affine ? weight.data() : nullptr,
                     .bias = affine ? bias.data() : nullptr,
                     .rows = rows,
                     .D = D,
                     .eps = 1e-6f,
                     .dtype = dtype,
                     .threads = int(draw(1, 3))});
    for (int64_t r = 0; r < rows; ++r) {
      double mean = 0, variance = 1e-6;
      for (int64_t i = 0; i < D; ++i) mean += read(x.data(), r * D + i, dtype) / D;
      for (int64_t i = 0; i < D; ++i) variance += std::pow(read(x.data(), r * D + i, dtype) - mean, 2) / D;
      for (int64_t i = 0; i < D; ++i) {
        double expected = (read(x.data(), r * D + i, dtype) - mean) / std::sqrt(variance);
        if (affine) expected = expected * read(weight.data(), i, dtype) + read(bias.data(), i, dtype);
        const double got = read(y.data(), r * D + i, dtype), eps = dtype == DType::fp32 ? 1e-4 : 0.01;
        REQUIRE(std::abs(got - expected) <= eps * (1 + std::abs(expected)), "D %ld: %g, expected %g", (long)D, got,
                expected);
      }
    }
  }
}

// Numbers of a size that a kernel may touch and no byte more, the last ones zero.
struct Numbers {
  std::vector<uint8_t> bytes;
  DType dtype;
  Numbers(int64_t n, DType dtype, float scale, int64_t zeros = 0)
      : bytes((n + zeros) * (dtype == DType::fp32 ? 4 : 2)), dtype(dtype) {
    for (int64_t i = 0; i < n; ++i) write(bytes.data(), i, dtype, rounded(scale * normal(), dtype));
  }
  double at(int64_t i) const { return read(bytes.data(), i, dtype); }
};

struct Packed {
  Numbers weight, bias;
  std::vector<uint8_t> cells;
  PackedWeight view;
  Packed(int64_t D, int64_t K, DType dtype)
      : weight(D * K, dtype, 1 / std::sqrt(float(K))),
        bias(D, DType::fp32, 1, (MAX_LANES - D % MAX_LANES) % MAX_LANES),
        cells(JOIN(kernels_, VITFAST_ISA).packed_bytes(D, K, dtype)) {
    JOIN(kernels_, VITFAST_ISA)
        .pack_weight({.weight = weight.bytes.data(), .packed = cells.data(), .D = D, .K = K, .dtype = dtype});
    view = {.cells = cells.data(), .bias = (const float*)bias.bytes.data(), .K = K, .D = D};
  }
  std::vector<double> apply(const std::vector<double>& x, int64_t rows) const {
    std::vector<double> y(rows * view.D);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < view.D; ++d) {
        y[r * view.D + d] = bias.at(d);
        for (int64_t k = 0; k < view.K; ++k) y[r * view.D + d] += x[r * view.K + k] * weight.at(d * view.K + k);
      }
    return y;
  }
};

static void check_linear_and_mlp() {
  const CpuKernels& kernels = JOIN(kernels_, VITFAST_ISA);
  for (int trial = 0; trial < 150 / share; ++trial) {
    const DType dtype = kernels.multiplies(DType::bf16) && trial % 2 ? DType::bf16 : DType::fp32;
    // odd widths where numbers go one by one; rows that a power of two lies between, or that are tiles as they lie;
    // sums in several pieces
    const bool many = trial % 10 == 9, wide = trial % 10 == 8, odd = dtype == DType::fp32;
    const bool whole = trial % 4 == 1;
    const int64_t rows = many ? draw(130, 330) : draw(1, 40), D = whole ? 16 * draw(1, 6) : 2 * draw(1, 50) - odd;
    const int64_t K = wide ? 1024 : whole ? 32 * draw(1, 3) : 2 * draw(1, 40) - odd;
    // one thread has enough rows to keep an MLP's hidden values
    const int threads = trial % 20 == 19 ? 1 : int(draw(1, 3));
    const Numbers x(rows * K, dtype, 2), residual(rows * D, dtype, 1), norm_weight(K, dtype, 1), norm_bias(K, dtype, 1);
    const Packed fc1(D, K, dtype), fc2(K, D, dtype);
    const bool affine = draw(0, 2);
    const LayerNormArgs norm{.weight = affine ? norm_weight.bytes.data() : nullptr,
                             .bias = affine ? norm_bias.bytes.data() : nullptr,
                             .D = K,
                             .eps = 1e-6f,
                             .dtype = dtype,
                             .threads = 1};
    std::vector<double> in(rows * K), normed(rows * K);
    for (int64_t r = 0; r < rows; ++r) {
      double mean = 0, variance = 1e-6;
      for (int64_t i = 0; i < K; ++i) mean += (in[r * K + i] = x.at(r * K + i)) / K;
      for (int64_t i = 0; i < K; ++i) variance += std::pow(in[r * K + i] - mean, 2) / K;
      for (int64_t i = 0; i < K; ++i)
        normed[r * K + i] = (in[r * K + i] - mean) / std::sqrt(variance) * (affine ? norm_weight.at(i) : 1) +
                            (affine ? norm_bias.at(i) : 0);
    }
    const double eps = dtype == DType::fp32 ? 1e-3 : 0.06;
    const auto compare = [&](const std::vector<uint8_t>& out, const std::vector<double>& expected, const char* what) {
      for (size_t i = 0; i < expected.size(); ++i) {
        const double got = read(out.data(), i, dtype);
        REQUIRE(std::abs(got - expected[i]) <= eps * (1 + std::abs(expected[i])),
                "%s rows %ld K %ld D %ld: %g at %ld, expected %g", what, (long)rows, (long)K, (long)D, got, (long)i,
                expected[i]);
      }
    };
    const bool normalises = draw(0, 1), adds = draw(0, 1), acts = draw(0, 1);
    const bool over = adds && draw(0, 1), biased = draw(0, 3);
    std::vector<uint8_t> out = residual.bytes;
    PackedWeight weight = fc1.view;
    if (!biased) weight.bias = nullptr;
    const void* const added = over ? out.data() : residual.bytes.data();
    LinearArgs args{.x = x.bytes.data(),
                    .norm = norm,
                    .normalises = normalises,
                    .weight = weight,
                    .residual = adds ? added : nullptr,
                    .residual_rows = rows,
                    .out = out.data(),
                    .rows = rows,
                    .dtype = dtype,
                    .act = acts ? int(Act::gelu) : NO_ACT,
                    .threads = threads};
    kernels.linear(args);
    std::vector<double> expected = fc1.apply(normalises ? normed : in, rows);
    for (size_t i = 0; i < expected.size(); ++i) {
      if (!biased) expected[i] -= fc1.bias.at(i % D);
      if (acts) expected[i] = activated(expected[i], Act::gelu);
      if (adds) expected[i] += residual.at(i);
    }
    compare(out, expected, "linear");
    if (kernels.takes_unpacked(D, K, dtype)) {
      std::vector<uint8_t> unpacked(out.size());
      args.weight.cells = fc1.weight.bytes.data();
      args.residual = adds ? residual.bytes.data() : nullptr;
      args.out = unpacked.data();
      kernels.linear_unpacked(args);
      REQUIRE(unpacked == out, "linear_unpacked rows %ld K %ld D %ld differs", (long)rows, (long)K, (long)D);
    }
    std::vector<double> hidden = fc1.apply(normed, rows);
    for (double& h : hidden) h = activated(h, Act::gelu);
    expected = fc2.apply(hidden, rows);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] += in[i];
    std::vector<uint8_t> in_place = x.bytes;  // the block's kernel writes over its input
    kernels.mlp({.x = in_place.data(),
                 .norm = norm,
                 .fc1 = fc1.view,
                 .fc2 = fc2.view,
                 .out = in_place.data(),
                 .rows = rows,
                 .dtype = dtype,
                 .act = int(Act::gelu),
                 .threads = threads});
    compare(in_place, expected, "mlp");
  }
}

// The block's result by its parts, which are checked above: the same bits, and nothing beside its memory.
static void check_block() {
  const CpuKernels& kernels = JOIN(kernels_, VITFAST_ISA);
  for (int trial = 0; trial < 20 / share; ++trial) {
    const DType dtype = kernels.multiplies(DType::bf16) && trial % 2 ? DType::bf16 : DType::fp32;
    const int64_t B = draw(1, 3), N = draw(1, 60), H = draw(1, 3), D = 2 * draw(1, 10), C = 2 * draw(1, 30);
    const int64_t rows = B * N, inner = H * D, size = dtype == DType::fp32 ? 4 : 2;
    const int threads = int(draw(1, 3)), act = int(Act::gelu);
    const Numbers x(rows * C, dtype, 1), weight(C, dtype, 1);
    const Packed qkv(3 * inner, C, dtype), proj(C, inner, dtype), fc1(2 * C, C, dtype), fc2(C, 2 * C, dtype);
    const LayerNormArgs norm{.weight = weight.bytes.data(), .D = C, .eps = 1e-6f, .dtype = dtype, .threads = 1};
    std::vector<uint8_t> projected(rows * inner * 3 * size), attended(rows * inner * size), y(rows * C * size), out(y);
    kernels.linear({.x = x.bytes.data(),
                    .norm = norm,
                    .normalises = true,
                    .weight = qkv.view,
                    .out = projected.data(),
                    .rows = rows,
                    .dtype = dtype,
                    .threads = threads});
    const auto part = [&](int64_t i) {
      return HeadsView{
          .data = projected.data() + i * inner * size, .image = N * inner * 3, .token = inner * 3, .head = D};
    };
    kernels.attention({.q = part(0),
                       .k = part(1),
                       .v = part(2),
                       .out = attended.data(),
                       .B = B,
                       .H = H,
                       .Nq = N,
                       .Nk = N,
                       .D = D,
                       .scale = 0.3f,
                       .dtype = dtype,
                       .threads = threads});
    kernels.linear({.x = attended.data(),
                    .weight = proj.view,
                    .residual = x.bytes.data(),
                    .residual_rows = rows,
                    .out = y.data(),
                    .rows = rows,
                    .dtype = dtype,
                    .threads = threads});
    kernels.mlp({.x = y.data(),
                 .norm = norm,
                 .fc1 = fc1.view,
                 .fc2 = fc2.view,
                 .out = y.data(),
                 .rows = rows,
                 .dtype = dtype,
                 .act = act,
                 .threads = threads});
    kernels.block({.x = x.bytes.data(),
                   .norm1 = norm,
                   .norm2 = norm,
                   .qkv = qkv.view,
                   .proj = proj.view,
                   .fc1 = fc1.view,
                   .fc2 = fc2.view,
                   .out = out.data(),
                   .B = B,
                   .N = N,
                   .H = H,
                   .D = D,
                   .scale = 0.3f,
                   .dtype = dtype,
                   .act = act,
                   .threads = threads});
    REQUIRE(out == y, "block B %ld N %ld H %ld D %ld C %ld differs", (long)B, (long)N, (long)H, (long)D, (long)C);
  }
}

// The stem's result by the patch rows, whose projection gets each image's positions, and prefix rows.
static void check_embed() {
  const CpuKernels& kernels = JOIN(kernels_, VITFAST_ISA);
  for (int trial = 0; trial < 40 / share; ++trial) {
    const DType dtype = kernels.multiplies(DType::bf16) && trial % 2 ? DType::bf16 : DType::fp32;
    const int64_t B = draw(1, 3), C = draw(1, 3), p = 2 * draw(1, 4), H = p * draw(1, 4), W = p * draw(1, 4),
                  P = draw(0, 2);
    const int64_t tokens = P + H / p * (W / p), K = C * p * p, D = draw(1, 50), size = dtype == DType::fp32 ? 4 : 2;
    const int threads = int(draw(1, 3));
    const Numbers images(B * C * H * W, DType::fp32, 1), positions(tokens * D, dtype, 1), prefix(P * D, dtype, 1);
    const Packed weight(D, K, dtype);
    const PatchGeometry geometry{.C = C,
                                 .H = H,
                                 .W = W,
                                 .ph = p,
                                 .pw = p,
                                 .P = P,
                                 .order = PatchOrder::chw,
                                 .image = C * H * W,
                                 .channel = H * W,
                                 .y = W,
                                 .x = 1};
    std::vector<uint8_t> rows(B * tokens * K * size), out(B * tokens * D * size);
    const bool adds = draw(0, 2);
    PatchRowsArgs patches{.geometry = geometry,
                          .images = images.bytes.data(),
                          .rows = rows.data(),
                          .B = B,
                          .from = DType::fp32,
                          .to = dtype,
                          .threads = threads};
    kernels.patch_rows(patches);
    patches.rows = nullptr;
    kernels.embed({.patches = patches,
                   .weight = weight.view,
                   .positions = adds ? positions.bytes.data() : nullptr,
                   .prefix = prefix.bytes.data(),
                   .tokens = out.data()});
    std::vector<double> x(B * tokens * K);
    for (size_t i = 0; i < x.size(); ++i) x[i] = read(rows.data(), i, dtype);
    const std::vector<double> projected = weight.apply(x, B * tokens);
    for (int64_t i = 0; i < B * tokens * D; ++i) {
      const int64_t token = i / D % tokens;
      double expected = projected[i] + (adds ? positions.at(i % (tokens * D)) : 0);
      if (token < P) expected = prefix.at(i % (tokens * D));
      const double got = read(out.data(), i, dtype), eps = token < P ? 0 : dtype == DType::fp32 ? 1e-4 : 0.01;
      REQUIRE(std::abs(got - expected) <= eps * (1 + std::abs(expected)), "embed: %g at token %ld, expected %g", got,
              (long)token, expected);
    }
  }
}

int main(int count, char** words) {
  if (count > 1) share = std::atoi(words[1]);
  check_attention();
  check_activations();
  check_layer_norm();
  check_linear_and_mlp();
  check_block();
  check_embed();
  std::puts("ok");
}
