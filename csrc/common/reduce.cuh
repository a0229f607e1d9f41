// Sums over a warp or a block of threads, in a fixed order.
#pragma once

namespace jdkd {

// Adds each of the N values over the lanes of a warp that differ in the bits from `lowest` on; all of them get the
// totals.
template <int lowest = 1, int N>
__device__ __forceinline__ void warp_sum(float (&values)[N]) {
#pragma unroll
  for (int offset = 16; offset >= lowest; offset /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
    }
  }
}

// Adds each of the N values over all threads; every thread gets the totals. Needs kThreads / 32 * N floats of `scratch`
// and is called by the whole block.
template <int kThreads, int N>
__device__ __forceinline__ void block_sum(float (&values)[N], float* scratch) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  constexpr int kWarps = kThreads / 32;
  warp_sum(values);
  __syncthreads();  // whoever still reads the scratch of the sum before this one
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      scratch[threadIdx.x / 32 * N + i] = values[i];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      values[i] += scratch[warp * N + i];
    }
  }
}

}  // namespace jdkd
