// What the kernels ask of a GPU in its own words: copies into shared memory, tensor cores, numbers of 16 bits. The
// tests compile the kernels for the host, where all of this is emulated by the header that takes the place of this
// part.
#pragma once

#include <cstdint>

namespace vitfast {

struct Half {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};
struct alignas(16) Bytes16 {
  uint32_t word[4];
};
struct alignas(8) Bytes8 {
  uint32_t word[2];
};

#ifdef __CUDACC__
#define VITFAST_BOTH __host__ __device__ __forceinline__
#else
#define VITFAST_BOTH inline
#endif

// wgmma's word for a matrix of 16 columns in shared memory, from byte `start` on, without a swizzle: 8 rows of 8
// numbers lie side by side in 128 bytes, the next 8 rows follow, and the other 8 columns lie `across` bytes behind. All
// in units of 16 bytes (PTX ISA, "Matrix descriptor": bits 0 the start, 16 the step along columns, 32 along rows).
VITFAST_BOTH uint64_t matrix_descriptor(uint32_t start, int across) {
  return (start >> 4 & 0x3fff) | static_cast<uint64_t>(across >> 4) << 16 | static_cast<uint64_t>(128 >> 4) << 32;
}

}  // namespace vitfast

#ifndef __CUDACC__
#include "cuda_on_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

// wgmma exists for 9.0 with its own features only; code for other cards has no body there
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VITFAST_WGMMA 1
#endif

namespace vitfast {
namespace {

__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }

// two numbers, the first in the low half
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack<Half>(float first, float second) {
  const __half2 both = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float first, float second) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

template <class Word>
__device__ __forceinline__ Word load_global(const void* from) {
  return __ldg(reinterpret_cast<const Word*>(from));
}
template <>
__device__ __forceinline__ Bytes16 load_global<Bytes16>(const void* from) {
  const uint4 word = __ldg(reinterpret_cast<const uint4*>(from));
  return {{word.x, word.y, word.z, word.w}};
}
template <>
__device__ __forceinline__ Bytes8 load_global<Bytes8>(const void* from) {
  const uint2 word = __ldg(reinterpret_cast<const uint2*>(from));
  return {{word.x, word.y}};
}

__device__ __forceinline__ void store_shared(void* to, const Bytes16& value) {
  *reinterpret_cast<uint4*>(to) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}

// `bytes` are 4, 8 or 16; zeros, and nothing is read, where not `there`
template <int bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool there) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int size = there ? bytes : 0;
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global), "r"(size), "n"(bytes)
                 : "memory");
}
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// until all but the last `left` groups are there, for this thread
template <int left>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// for who reads the code: what a launch will ask for stands nowhere else in it
template <int bytes>
__device__ __forceinline__ void note_shared_bytes() {
  asm volatile("// dynamic shared memory: %0" ::"n"(bytes));
}

// the kernel fails, and with it everything of this process on the device
__device__ __forceinline__ void stop() { __trap(); }

// four 8 x 8 matrices, whose rows' addresses lanes 0 to 7, 8 to 15 ... give; lane i gets numbers 2 (i % 4) and the next
// of row i / 4
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// the same of transposed matrices: lane i gets column i / 4
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// c[16][8] += a[16][16] b[16][8], spread over a warp as PTX's mma.m16n8k16 has it
template <class T>
__device__ __forceinline__ void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  if constexpr (__is_same(T, Half))
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#ifdef VITFAST_WGMMA

// what threads wrote to shared memory becomes visible to wgmma after it and a barrier
__device__ __forceinline__ void show_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void begin_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void close_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int left>
__device__ __forceinline__ void wait_for_wgmma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}

__device__ __forceinline__ uint64_t described(const char* matrix, int across) {
  return matrix_descriptor(static_cast<uint32_t>(__cvta_generic_to_shared(matrix)), across);
}

#define VITFAST_SUMS_4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define VITFAST_SUMS_16(i) VITFAST_SUMS_4(i), VITFAST_SUMS_4(i + 1), VITFAST_SUMS_4(i + 2), VITFAST_SUMS_4(i + 3)
#define VITFAST_SUMS_64(i) VITFAST_SUMS_16(i), VITFAST_SUMS_16(i + 4), VITFAST_SUMS_16(i + 8), VITFAST_SUMS_16(i + 12)
#define VITFAST_NAMES_64                                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VITFAST_NAMES_128                                                                                            \
  VITFAST_NAMES_64                                                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, " \
  "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "     \
  "%125, %126, %127"
#define VITFAST_WGMMA_256(type)                                                                    \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" VITFAST_NAMES_128 \
               "}, %128, %129, 1, 1, 1, 0, 0;"                                                     \
               : VITFAST_SUMS_64(0), VITFAST_SUMS_64(16)                                           \
               : "l"(from_a), "l"(from_b))

// c[64][256] += a[64][16] b[256][16]^T over four warps: each warp has 16 rows, in blocks of 8 columns that are spread
// as multiply_fragments has them. Nothing of c, a and b may be touched before wait_for_wgmma.
template <class T>
__device__ __forceinline__ void multiply_async(float (&c)[32][4], const char* a, int a_across, const char* b,
                                               int b_across) {
  const uint64_t from_a = described(a, a_across), from_b = described(b, b_across);
  if constexpr (__is_same(T, Bf16))
    VITFAST_WGMMA_256("bf16");
  else
    VITFAST_WGMMA_256("f16");
}

// keeps the compiler from moving a sum to another register while wgmma adds to it
__device__ __forceinline__ void keep_in_place(float& sum) { asm volatile("" : "+f"(sum)::"memory"); }

#endif  // VITFAST_WGMMA

// a kernel that only stops has fewer, one that does something more
constexpr int FEWEST_REGISTERS = 8;

// Bytes of dynamic shared memory that a block of `kernel` may have on the current device, where that is asked for; once
// for each of them, since another thread may start the same kernel with more.
inline cudaError_t most_shared(const void* kernel, int* most) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (found != known.end()) {
    *most = found->second;
    return cudaSuccess;
  }
  cudaFuncAttributes has;
  if (const cudaError_t error = cudaFuncGetAttributes(&has, kernel)) return error;
  // the code that the driver chose for this card has no body for this tile
  if (has.numRegs < FEWEST_REGISTERS) return cudaErrorInvalidDeviceFunction;
  if (const cudaError_t error = cudaDeviceGetAttribute(most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))
    return error;
  *most -= static_cast<int>(has.sharedSizeBytes);
  const cudaFuncAttribute shared = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, shared, *most)) return error;
  known[{kernel, device}] = *most;
  return cudaSuccess;
}

template <class Args>
inline cudaError_t start(void (*kernel)(Args), int64_t blocks, int threads, int shared, void* stream,
                         const Args& args) {
  int most = 0;
  if (const cudaError_t error = most_shared(reinterpret_cast<const void*>(kernel), &most)) {
    // or the next call would report it
    cudaGetLastError();
    return error;
  }
  if (shared > most) return cudaErrorInvalidValue;
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace
}  // namespace vitfast

#endif  // __CUDACC__
