// From images in memory to a tile of patch rows in shared memory: which pixels, normalised, in the number type that is
// multiplied. Three ways to read them: side by side in a channel, side by side with their channels, one by one.
#pragma once

#include "cuda/device.cuh"
#include "cuda/patch_embed.h"
#include "shared/patch_geometry.h"

namespace vitfast {
namespace {

// whose constants find a place beside everything else, on every card
constexpr int MOST_CHANNELS = 1024;

// ImagesArgs as kernels take it.
struct Images {
  PatchGeometry g;
  const char* data;  // of packed images: of the first
  DType dtype;
  int bytes;  // of a pixel
  const float *mean, *std;
  const PackedImage* packed;  // null: a batch
  int64_t count, patches;     // of images and of their patches
  int K;                      // columns(g)
  int together;               // pixels that ScatteredPixels loads at once
};

// The patches that a tile's rows are.
template <int ROWS>
struct TileRows {
  struct Row {
    const char* origin;     // first pixel
    int32_t height, width;  // of what is inside the image; 0 for what is no patch
  } row[ROWS];
  int64_t token[ROWS], position[ROWS];      // rows of `tokens` and `positions`
  int64_t channel[ROWS], y[ROWS], x[ROWS];  // strides

  __device__ void find(const Images& images, int64_t first) {
    for (int t = threadIdx.x; t < ROWS; t += blockDim.x) {
      const int64_t m = first + t;
      row[t] = {images.data, 0, 0};
      channel[t] = y[t] = x[t] = 0;
      if (m >= images.patches) continue;
      PatchGeometry g = images.g;
      const char* data = images.data;
      int64_t b = 0, number = m;
      if (images.packed) {
        b = image_of(images.packed, images.count, m);
        const PackedImage image = images.packed[b];
        g = geometry_of(g, image);
        data = static_cast<const char*>(image.data);
        number = m - image.first;
      }
      const Patch patch = images.packed ? patch_of(g, 0, number) : patch_at(g, m);
      if (!images.packed) b = patch.b;
      row[t].origin = data + offset_of(g, {patch.b, 0, patch.y, patch.x}) * images.bytes;
      row[t].height = static_cast<int32_t>(g.H - patch.y < g.ph ? g.H - patch.y : g.ph);
      row[t].width = static_cast<int32_t>(g.W - patch.x < g.pw ? g.W - patch.x : g.pw);
      channel[t] = g.channel, y[t] = g.y, x[t] = g.x;
      token[t] = row_of(g, b, m);
      position[t] = images.packed ? m : patch.number;
    }
  }

  __device__ bool has(int r, const InPatch<int>& p) const { return p.y < row[r].height && p.x < row[r].width; }

  __device__ const char* at(int r, const InPatch<int>& p, int bytes) const {
    return row[r].origin + (p.c * channel[r] + p.y * y[r] + p.x * x[r]) * bytes;
  }
};

// What uint8 pixels of each channel are multiplied by, and what is added.
__device__ inline void find_scaling(const Images& images, float* scaling) {
  for (int c = threadIdx.x; c < images.g.C; c += blockDim.x) {
    const float scale = images.mean ? 1 / images.std[c] : 1;
    scaling[2 * c] = images.mean ? scale / 255 : 1;
    scaling[2 * c + 1] = images.mean ? -images.mean[c] * scale : 0;
  }
}

// Tiles lie in shared memory as chunks of CHUNK columns, in each of which the rows follow each other. The 16 bytes
// behind a chunk bring the same row of the next one to other banks.
template <class T, int ROWS>
constexpr int CHUNK_BYTES = ROWS * CHUNK * static_cast<int>(sizeof(T)) + 16;

template <class T, int ROWS>
__device__ __forceinline__ char* cell(char* tile, int chunk, int row) {
  return tile + chunk * CHUNK_BYTES<T, ROWS> + row * (CHUNK * static_cast<int>(sizeof(T)));
}

template <class From>
constexpr int SIDE = sizeof(From) == 1 ? 16 : CHUNK;  // pixels that lie side by side

// pixel i of loaded words
template <class From>
__device__ __forceinline__ float pixel_in(const uint32_t* words, int i) {
  if constexpr (sizeof(From) == 1) return static_cast<float>(words[i / 4] >> (8 * (i % 4)) & 0xff);
  if constexpr (sizeof(From) == 2) return to_float(From{static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))});
  if constexpr (sizeof(From) == 4) return as_float(words[i]);
}

template <class T>
__device__ __forceinline__ Bytes16 packed(const float (&v)[CHUNK]) {
  return {{pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])}};
}

template <int count>
__device__ __forceinline__ void load_words(uint32_t (&words)[count], const char* from, bool there) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const Bytes16 loaded = there ? load_global<Bytes16>(from + 4 * i) : Bytes16{};
#pragma unroll
    for (int j = 0; j < 4; ++j) words[i + j] = loaded.word[j];
  }
}

// A group is what one thread loads at once. Neighbouring threads take neighbouring rows, that is patches, which lie
// side by side in a line of the image.
template <int ROWS, int GROUPS, int THREADS>
constexpr int EACH = (ROWS * GROUPS + THREADS - 1) / THREADS;

// Channels apart: SIDE pixels of a channel are one load.
template <class Source, class T, int ROWS, int THREADS>
class PlanarPixels {
 public:
  using From = Source;
  static constexpr int interleaved_side = 0;
  static constexpr bool one_by_one = false;

  template <int CHUNKS>
  class Loader {
    static constexpr int GROUPS = CHUNKS * CHUNK / SIDE<From>, MINE = EACH<ROWS, GROUPS, THREADS>;
    static constexpr bool as_they_are = __is_same(From, T);

   public:
    // begin to read what belongs to this step
    __device__ void fetch(const Images& images, const TileRows<ROWS>& rows, int step, char* stage) {
#pragma unroll
      for (int j = 0; j < MINE; ++j) {
        const int i = threadIdx.x + j * THREADS, row = i % ROWS, column = (step * GROUPS + i / ROWS) * SIDE<From>;
        const InPatch<int> p = place_in_patch<int>(images.g, column);
        inside[j] = i < ROWS * GROUPS && column < images.K && rows.has(row, p);
        channel[j] = inside[j] ? p.c : 0;
        const char* const from = inside[j] ? rows.at(row, p, sizeof(From)) : images.data;
        if constexpr (as_they_are) {
          if (i < ROWS * GROUPS) copy_async<16>(cell<T, ROWS>(stage, i / ROWS, row), from, inside[j]);
        } else {
          load_words(words[j], from, inside[j]);
        }
      }
    }

    // and bring it to shared memory
    __device__ void put(const float* scaling, char* stage) const {
      if constexpr (!as_they_are) {
#pragma unroll
        for (int j = 0; j < MINE; ++j) put_group(threadIdx.x + j * THREADS, j, scaling, stage);
      }
    }

   private:
    __device__ void put_group(int i, int j, const float* scaling, char* stage) const {
      if (i >= ROWS * GROUPS) return;
      const float scale = scaling[2 * channel[j]], shift = inside[j] ? scaling[2 * channel[j] + 1] : 0;
#pragma unroll
      for (int h = 0; h < SIDE<From> / CHUNK; ++h) {
        float v[CHUNK];
#pragma unroll
        for (int e = 0; e < CHUNK; ++e) {
          v[e] = pixel_in<From>(words[j], h * CHUNK + e);
          if constexpr (sizeof(From) == 1) v[e] = v[e] * scale + shift;
        }
        store_shared(cell<T, ROWS>(stage, i / ROWS * (SIDE<From> / CHUNK) + h, i % ROWS), packed<T>(v));
      }
    }

    uint32_t words[MINE][SIDE<From> * sizeof(From) / 4];
    bool inside[MINE];
    int channel[MINE];
  };
};

// Three channels side by side: SIDE pixels with all of them are one group, see column_of_interleaved_chunk.
template <class Source, class T, int ROWS, int THREADS>
class InterleavedPixels {
 public:
  using From = Source;
  static constexpr int interleaved_side = SIDE<From>;
  static constexpr bool one_by_one = false;

  template <int CHUNKS>
  class Loader {
    static constexpr int IN_GROUP = 3 * SIDE<From> / CHUNK, GROUPS = CHUNKS / IN_GROUP;
    static constexpr int MINE = EACH<ROWS, GROUPS, THREADS>;
    static_assert(CHUNKS % IN_GROUP == 0, "a step has whole groups");

   public:
    __device__ void fetch(const Images& images, const TileRows<ROWS>& rows, int step, char*) {
#pragma unroll
      for (int j = 0; j < MINE; ++j) {
        const int i = threadIdx.x + j * THREADS, row = i % ROWS, chunk = (step * GROUPS + i / ROWS) * IN_GROUP;
        const int column = column_of_interleaved_chunk<int>(images.g, chunk, SIDE<From>);
        const InPatch<int> p = place_in_patch<int>(images.g, column);
        inside[j] = i < ROWS * GROUPS && chunk * CHUNK < images.K && rows.has(row, p);
        load_words(words[j], inside[j] ? rows.at(row, p, sizeof(From)) : images.data, inside[j]);
      }
    }

    __device__ void put(const float* scaling, char* stage) const {
#pragma unroll
      for (int j = 0; j < MINE; ++j) {
        const int i = threadIdx.x + j * THREADS, row = i % ROWS;
        if (i >= ROWS * GROUPS) break;
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          const float scale = scaling[2 * c], shift = inside[j] ? scaling[2 * c + 1] : 0;
#pragma unroll
          for (int h = 0; h < SIDE<From> / CHUNK; ++h) {
            float v[CHUNK];
#pragma unroll
            for (int e = 0; e < CHUNK; ++e) {
              v[e] = pixel_in<From>(words[j], 3 * (h * CHUNK + e) + c);
              if constexpr (sizeof(From) == 1) v[e] = v[e] * scale + shift;
            }
            store_shared(cell<T, ROWS>(stage, i / ROWS * IN_GROUP + c * (SIDE<From> / CHUNK) + h, row), packed<T>(v));
          }
        }
      }
    }

   private:
    uint32_t words[MINE][3 * SIDE<From> * sizeof(From) / 4];
    bool inside[MINE];
  };
};

// `count` pixels that may be loaded together, each to a word of its own
template <int count>
__device__ __forceinline__ void load_pixels(uint32_t* to, const char* from, int bytes) {
  if (bytes == 1) {
    uint32_t word;
    if constexpr (count == 4) word = load_global<uint32_t>(from);
    if constexpr (count == 2) word = load_global<uint16_t>(from);
    if constexpr (count == 1) word = load_global<uint8_t>(from);
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = word >> (8 * i) & 0xff;
  } else if (bytes == 2) {
    Bytes8 both{};
    if constexpr (count == 4) both = load_global<Bytes8>(from);
    if constexpr (count == 2) both.word[0] = load_global<uint32_t>(from);
    if constexpr (count == 1) both.word[0] = load_global<uint16_t>(from);
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = both.word[i / 2] >> (16 * (i % 2)) & 0xffff;
  } else {
    Bytes16 all{};
    if constexpr (count == 4) all = load_global<Bytes16>(from);
    if constexpr (count == 2) {
      const Bytes8 both = load_global<Bytes8>(from);
      all.word[0] = both.word[0], all.word[1] = both.word[1];
    }
    if constexpr (count == 1) all.word[0] = load_global<uint32_t>(from);
#pragma unroll
    for (int i = 0; i < count; ++i) to[i] = all.word[i];
  }
}

// What load_pixels gave, as a number.
__device__ __forceinline__ float pixel_of(uint32_t bits, DType dtype, float scale, float shift) {
  if (dtype == DType::uint8) return static_cast<float>(bits) * scale + shift;
  if (dtype == DType::fp16) return to_float(Half{static_cast<uint16_t>(bits)});
  if (dtype == DType::bf16) return to_float(Bf16{static_cast<uint16_t>(bits)});
  return as_float(bits);
}

// The place in its patch of what is `count` columns behind `column`, whose place is p.
__device__ __forceinline__ InPatch<int> following(const PatchGeometry& g, const InPatch<int>& p, int column,
                                                  int count) {
  return g.order == PatchOrder::chw ? after<int>(g, p, count) : place_in_patch<int>(g, column + count);
}

// CHUNK pixels of a row from `column` on; the bits of `inside` say which of them are in the image.
template <int count, class Rows>
__device__ __forceinline__ void load_chunk(uint32_t (&words)[CHUNK], uint32_t& inside, const Images& images,
                                           const Rows& rows, int row, int column) {
  InPatch<int> p = place_in_patch<int>(images.g, column);
  inside = 0;
#pragma unroll
  for (int e = 0; e < CHUNK; e += count) {
    const bool there = column + e < images.K && rows.has(row, p);
    if (there) load_pixels<count>(words + e, rows.at(row, p, images.bytes), images.bytes);
    if (there) inside |= ((1u << count) - 1) << e;
    p = following(images.g, p, column + e, count);
  }
}

template <class Rows>
__device__ __forceinline__ void load_chunk(uint32_t (&words)[CHUNK], uint32_t& inside, const Images& images,
                                           const Rows& rows, int row, int column) {
  if (images.together == 4) return load_chunk<4>(words, inside, images, rows, row, column);
  if (images.together == 2) return load_chunk<2>(words, inside, images, rows, row, column);
  load_chunk<1>(words, inside, images, rows, row, column);
}

__device__ __forceinline__ void pixels_of_chunk(float (&v)[CHUNK], const uint32_t (&words)[CHUNK], uint32_t inside,
                                                const Images& images, const float* scaling, int column) {
  InPatch<int> p = place_in_patch<int>(images.g, column);
#pragma unroll
  for (int e = 0; e < CHUNK; ++e) {
    float scale = 1, shift = 0;
    const bool there = inside >> e & 1;
    if (images.dtype == DType::uint8 && there) scale = scaling[2 * p.c], shift = scaling[2 * p.c + 1];
    v[e] = there ? pixel_of(words[e], images.dtype, scale, shift) : 0;
    p = following(images.g, p, column + e, 1);
  }
}

// Any strides, any patch, any number type.
template <class T, int ROWS, int THREADS>
class ScatteredPixels {
 public:
  static constexpr int interleaved_side = 0;
  static constexpr bool one_by_one = true;

  template <int CHUNKS>
  class Loader {
    static constexpr int MINE = EACH<ROWS, CHUNKS, THREADS>;

   public:
    __device__ void fetch(const Images& images, const TileRows<ROWS>& rows, int step, char*) {
      of = &images;
      first = step * CHUNKS * CHUNK;
#pragma unroll
      for (int j = 0; j < MINE; ++j) {
        const int i = threadIdx.x + j * THREADS;
        // past the tile's chunks nothing is inside
        const int column = i < ROWS * CHUNKS ? first + i / ROWS * CHUNK : images.K;
        load_chunk(words[j], inside[j], images, rows, i % ROWS, column);
      }
    }

    __device__ void put(const float* scaling, char* stage) const {
#pragma unroll
      for (int j = 0; j < MINE; ++j) {
        const int i = threadIdx.x + j * THREADS, row = i % ROWS;
        if (i >= ROWS * CHUNKS) break;
        float v[CHUNK];
        pixels_of_chunk(v, words[j], inside[j], *of, scaling, first + i / ROWS * CHUNK);
        char* const to = cell<T, ROWS>(stage, i / ROWS, row);
        if constexpr (sizeof(T) == 4) {
          store_shared(to, {{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])}});
          store_shared(to + 16, {{as_bits(v[4]), as_bits(v[5]), as_bits(v[6]), as_bits(v[7])}});
        } else {
          store_shared(to, packed<T>(v));
        }
      }
    }

   private:
    const Images* of;
    int first;
    uint32_t words[MINE][CHUNK];
    uint32_t inside[MINE];
  };
};

}  // namespace
}  // namespace vitfast
