// Sixteen bytes at a time: what a thread loads and stores at once, and floats from and to the element types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace jdkd {

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float as_float(__half value) { return __half2float(value); }
__device__ __forceinline__ void assign(float& to, float value) { to = value; }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void assign(__half& to, float value) { to = __float2half_rn(value); }

constexpr int kPackBytes = 16;

__host__ __device__ __forceinline__ bool is_pack_aligned(const void* at) {
  return reinterpret_cast<uintptr_t>(at) % kPackBytes == 0;
}

// kCount neighbours of a tensor, in as few registers as they fit: sixteen bytes, or one element where memory does not
// allow more.
template <typename T, int kElements = kPackBytes / sizeof(T)>
struct Pack {
  static constexpr int kCount = kElements, kBytes = kElements * sizeof(T);
  using Bits = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>;
  static_assert(sizeof(Bits) == kBytes);
  Bits bits;

  __device__ __forceinline__ float operator[](int i) const {
    T values[kCount];
    memcpy(values, &bits, kBytes);
    return as_float(values[i]);
  }
  __device__ __forceinline__ void round(const float (&from)[kCount]) {
    T values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      assign(values[i], from[i]);
    }
    memcpy(&bits, values, kBytes);
  }

  // Element by element unless `wide`, which says that the address is aligned for it.
  __device__ __forceinline__ void load(const T* from, bool wide) {
    if (wide) {
      bits = __ldg(reinterpret_cast<const Bits*>(from));
    } else {
      T values[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[i] = from[i];
      }
      memcpy(&bits, values, kBytes);
    }
  }
  __device__ __forceinline__ void store(T* to, bool wide) const {
    if (wide) {
      __stwb(reinterpret_cast<Bits*>(to), bits);  // an assignment may be taken apart
    } else {
      T values[kCount];
      memcpy(values, &bits, kBytes);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        to[i] = values[i];
      }
    }
  }
};

}  // namespace jdkd
