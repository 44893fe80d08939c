// Random numbers and strides for the test programs, and what they do when something is wrong.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

static std::mt19937_64 generator(0);

// from low to high, both included
static int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

#define REQUIRE(condition, ...)                                            \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s is false: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                            \
      std::printf("\n");                                                   \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

// Strides of `sizes` in the order `order` (innermost first) with random gaps; returns how many numbers they span.
static int64_t lay_out(const std::vector<int64_t>& sizes, const std::vector<int>& order, bool gaps,
                       std::vector<int64_t>& strides) {
  strides.assign(sizes.size(), 0);
  int64_t step = 1, span = 1;
  for (int dim : order) {
    if (gaps && draw(0, 1)) step += draw(0, 4);
    strides[dim] = step;
    span += (sizes[dim] - 1) * step;
    step *= sizes[dim];
    if (step < span) step = span;
  }
  return span;
}

static std::vector<int> random_order(int dims) {
  std::vector<int> order(dims);
  for (int i = 0; i < dims; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), generator);
  return order;
}
