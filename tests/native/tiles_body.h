// One of the two bodies of csrc/cpu/tiles.h behind functions: each is compiled apart (tiles_body.cpp).
#pragma once

#include <cstdint>

struct Step {
  enum What { zero, load, store, multiply, call } what;
  int tile = 0, a = 0, b = 0;  // a and b: of a product, see operands()
  void* memory = nullptr;
  int64_t row_bytes = 0;
  void (*function)() = nullptr;  // called with the tiles alive
};

struct Body {
  void (*run)(const Step* steps, int64_t count);  // on tiles of its own
  // a b with all in one function, of whose numbers nothing else knows: 16 x 16 sums of a[m][2k] b[k][2n] and so on
  void (*product)(const uint16_t* a, const uint16_t* b, float* sums);
};
extern const Body real_body, plain_body;

// Products that are compiled, so that each tile is each operand.
constexpr int PRODUCTS = 32;
struct Operands {
  int sum, a, b;
};
constexpr Operands operands(int product) {
  const int sum = product % 8, a = (sum + (product & 8 ? 1 : 3)) % 8;
  return {sum, a, (a + (product & 16 ? 1 : 4)) % 8};
}
