// What only compute capability 9.0 has and a product with groups of warps for different work needs, in the kernels'
// own words: barriers in shared memory that count arrivals and bytes, bulk copies of boxes of a matrix, clusters of
// blocks, wgmma on what such copies wrote. The tests have all of it emulated on the host.
#pragma once

#include "cuda/device.cuh"

namespace vitfast {

// a swizzle of 128 bytes: 8 rows of as many make up a pattern
constexpr int SWIZZLED = 128, PATTERN = 8 * SWIZZLED;
constexpr int GROUP_THREADS = 128, GROUP_WARPS = 4;

// wgmma's word for a matrix in shared memory whose rows, of SWIZZLED bytes, follow each other as bulk copies with that
// swizzle write them; `start` is where its first column begins, in a pattern's first row (PTX ISA, "Matrix
// descriptor": bits 0 the start, 32 the step to the next 8 rows, 62 the swizzle).
VITFAST_BOTH uint64_t swizzled_descriptor(uint32_t start) {
  return (start >> 4 & 0x3fff) | uint64_t{1} << 16 | static_cast<uint64_t>(PATTERN >> 4) << 32 | uint64_t{1} << 62;
}

// An mbarrier: a phase of it ends when all its arrivals and all bytes that were announced are there. Phases are told
// apart by parity, 0 for the first; waiting for parity 1 in the first one goes through.
struct alignas(8) Barrier {
  uint64_t state;
};

}  // namespace vitfast

#ifndef __CUDACC__
#include "hopper_on_host.h"
#else

#include <cuda.h>

namespace vitfast {
namespace {

using TensorMap = CUtensorMap;

// begins at a multiple of PATTERN
__device__ __forceinline__ char* swizzled_memory() {
  extern __shared__ __align__(1024) char patterns[];
  return patterns;
}

__device__ __forceinline__ uint32_t exchanged(uint32_t word, int distance) {
  return __shfl_xor_sync(0xffffffff, word, distance);
}

// to 2 ulp, and 0 where the result is no normal number
__device__ __forceinline__ float exp2_about(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// to 1 ulp
__device__ __forceinline__ float reciprocal_about(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// NaN where x is
__device__ __forceinline__ float smaller(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

#ifdef VITFAST_WGMMA

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// registers of each thread of this group of four warps, the others' being given back or taken
template <int count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// all threads of a cluster's blocks
template <int blocks>
__device__ __forceinline__ void meet_cluster() {
  if constexpr (blocks == 1)
    __syncthreads();
  else
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void begin_barrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
// to the other blocks and to copies, before the cluster meets
__device__ __forceinline__ void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// at the barrier of the same place in block `rank` of the cluster
__device__ __forceinline__ void arrive_in_block(Barrier& barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void arrive_and_expect(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void wait_for(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void fetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// The map's box from (row, column) on to shared memory, with zeros where the matrix has ended; its bytes arrive at the
// barrier. With `blocks` above 1 to the same places of all blocks of the cluster, and at the barrier of each.
template <int blocks>
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int64_t row, int column, Barrier& barrier) {
  if constexpr (blocks == 1)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(column), "r"(static_cast<int>(row)), "r"(shared_address(&barrier))
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(static_cast<int>(row)), "r"(shared_address(&barrier)),
        "h"(static_cast<uint16_t>((1 << blocks) - 1))
        : "memory");
}

#define VITFAST_NAMES_64                                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VITFAST_WGMMA_128(type)                                                                   \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" VITFAST_NAMES_64 \
               "}, %64, %65, 1, 1, 1, 0, 0;"                                                      \
               : VITFAST_SUMS_64(0)                                                               \
               : "l"(from_a), "l"(from_b))

// c[64][8 * eighths] += a[64][16] b[8 * eighths][16]^T by four warps, of what is swizzled; see multiply_async.
template <class T, int eighths>
__device__ __forceinline__ void multiply_swizzled(float (&c)[eighths][4], const char* a, const char* b) {
  static_assert(eighths == 16 || eighths == 32, "columns that there is no instruction for here");
  const uint64_t from_a = swizzled_descriptor(shared_address(a)), from_b = swizzled_descriptor(shared_address(b));
  if constexpr (eighths == 16 && __is_same(T, Bf16))
    VITFAST_WGMMA_128("bf16");
  else if constexpr (eighths == 16)
    VITFAST_WGMMA_128("f16");
  else if constexpr (__is_same(T, Bf16))
    VITFAST_WGMMA_256("bf16");
  else
    VITFAST_WGMMA_256("f16");
}

#endif  // VITFAST_WGMMA

// Makes bulk copies of boxes [box_rows, SWIZZLED bytes] out of a matrix of numbers of 16 bits possible.
inline cudaError_t describe(TensorMap* map, const void* matrix, bool bf16, int64_t rows, int64_t columns,
                            int64_t row_bytes, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  // asked of the driver: the extension is linked to the runtime only
  static const std::pair<cudaError_t, Encode> found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error == cudaSuccess && result != cudaDriverEntryPointSuccess) error = cudaErrorNotSupported;
    return std::pair(error, reinterpret_cast<Encode>(function));
  }();
  if (found.first != cudaSuccess) return found.first;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t steps[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {SWIZZLED / 2, static_cast<cuuint32_t>(box_rows)}, every[2] = {1, 1};
  const CUresult made =
      found.second(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                   const_cast<void*>(matrix), sizes, steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// As `start`, in clusters.
template <class Args>
inline cudaError_t start_clusters(void (*kernel)(Args), int cluster, int64_t blocks, int threads, int shared,
                                  void* stream, const Args& args) {
  int most = 0;
  if (const cudaError_t error = most_shared(reinterpret_cast<const void*>(kernel), &most)) {
    // or the next call would report it
    cudaGetLastError();
    return error;
  }
  if (shared > most) return cudaErrorInvalidValue;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args);
  cudaGetLastError();
  return error;
}

inline cudaError_t multiprocessors_of(int device, int* count) {
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace
}  // namespace vitfast

#endif  // __CUDACC__
