// The thread's configuration of tiles, and processes that may not end well.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "random_layout.h"

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
  bool operator==(const Configuration& other) const { return !std::memcmp(this, &other, sizeof other); }
};

static void configure(const Configuration& c) { asm volatile("ldtilecfg %0" : : "m"(c) : "memory"); }
static void release() { asm volatile("tilerelease" : : : "memory"); }
static Configuration configuration() {
  Configuration c;
  asm volatile("sttilecfg %0" : "=m"(c) : : "memory");
  return c;
}
static Configuration shapes(int rows, int row_bytes) {
  Configuration c{.palette = 1};
  for (int tile = 0; tile < 8; ++tile) {
    c.rows[tile] = rows;
    c.row_bytes[tile] = row_bytes;
  }
  return c;
}
// tiles of different shapes, as for a product's tails
static Configuration of_others() {
  Configuration c{.palette = 1};
  for (int tile = 0; tile < 7; ++tile) {
    c.rows[tile] = 16 - tile;
    c.row_bytes[tile] = 64 - 8 * tile;
  }
  return c;
}

static uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
static float number(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// A child's exit status; below 0 the signal that ended it. What it says on stderr goes to `said`.
template <class F>
static int in_child(F&& function, std::string* said = nullptr) {
  int ends[2];
  REQUIRE(!pipe(ends), "no pipe");
  const pid_t child = fork();
  if (!child) {
    dup2(ends[1], 2);
    function();
    _exit(0);
  }
  close(ends[1]);
  char buffer[4096];
  for (ssize_t got; (got = ::read(ends[0], buffer, sizeof buffer)) > 0;)
    if (said) said->append(buffer, got);
  close(ends[0]);
  int status;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}
