// BODY: real_body or plain_body
#include "tiles_body.h"

#include <cstring>
#include <utility>

#include "cpu/tiles.h"

namespace {

template <int product>
void multiply(Tiles& tiles) {
  constexpr Operands o = operands(product);
  tiles.multiply<o.sum, o.a, o.b>();
}

template <int... tile>
void zero(Tiles& tiles, int wanted, std::integer_sequence<int, tile...>) {
  (void)((tile == wanted ? tiles.zero<tile>(), true : false) || ...);
}
template <int... tile>
void load(Tiles& tiles, const Step& s, std::integer_sequence<int, tile...>) {
  (void)((tile == s.tile ? tiles.load<tile>(s.memory, s.row_bytes), true : false) || ...);
}
template <int... tile>
void store(Tiles& tiles, const Step& s, std::integer_sequence<int, tile...>) {
  (void)((tile == s.tile ? tiles.store<tile>(s.memory, s.row_bytes), true : false) || ...);
}
template <int... product>
void multiply(Tiles& tiles, int wanted, std::integer_sequence<int, product...>) {
  (void)((product == wanted ? multiply<product>(tiles), true : false) || ...);
}

void run(const Step* steps, int64_t count) {
  Tiles tiles;
  const auto every = std::make_integer_sequence<int, 8>();
  for (int64_t i = 0; i < count; ++i) {
    const Step& s = steps[i];
    switch (s.what) {
      case Step::zero: zero(tiles, s.tile, every); break;
      case Step::load: load(tiles, s, every); break;
      case Step::store: store(tiles, s, every); break;
      case Step::multiply: multiply(tiles, s.tile, std::make_integer_sequence<int, PRODUCTS>()); break;
      case Step::call: s.function(); break;
    }
  }
}

// Memory that only the instructions read or write: what the compiler is not told of, it drops.
void product(const uint16_t* a, const uint16_t* b, float* sums) {
  Tiles tiles;
  uint16_t first[16][32], second[16][32];
  float out[16][16];
  memcpy(first, a, sizeof first);
  memcpy(second, b, sizeof second);
  memset(out, 0, sizeof out);
  tiles.load<0>(out, sizeof out[0]);
  tiles.load<1>(first, sizeof first[0]);
  tiles.load<2>(second, sizeof second[0]);
  tiles.multiply<0, 1, 2>();
  memset(first, 0, sizeof first);
  tiles.load<1>(first, sizeof first[0]);
  tiles.multiply<0, 1, 2>();
  memset(out, 0, sizeof out);
  tiles.store<0>(out, sizeof out[0]);
  memcpy(sums, out, sizeof out);
}

}  // namespace

extern const Body BODY = {.run = run, .product = product};
