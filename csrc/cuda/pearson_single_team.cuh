// How a team of warps reads its part of a channel into shared memory, walks over it, and adds up.
#pragma once

#include "common/hopper.cuh"
#include "ops/pearson_plan.h"

#include <cuda_bf16.h>

#include <type_traits>

namespace jdkd::pearson::single {

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void assign(float& to, float value) { to = value; }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

template <typename T, int V>
__device__ __forceinline__ void widen(const Vector<T, V>& from, float (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    to[i] = as_float(from.at[i]);
  }
}

// A bfloat16 is the upper half of its float: one instruction an element.
__device__ __forceinline__ void widen(const Vector<__nv_bfloat16, 8>& from, float (&to)[8]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(&from);
  const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

template <int V>
__device__ __forceinline__ float pairwise_sum(float (&x)[V]) {
#pragma unroll
  for (int width = V / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      x[i] += x[i + width];
    }
  }
  return x[0];
}

// The sum of a vector, or about that: a sweep may centre on any value near the mean, since it corrects for the rest.
template <typename T, int V>
__device__ __forceinline__ float rough_sum(const Vector<T, V>& from) {
  float x[V];
  widen(from, x);
  return pairwise_sum(x);
}

// In pairs of bfloat16 up to four elements, which saves ten of sixteen instructions. Equal values add up exactly.
__device__ __forceinline__ float rough_sum(const Vector<__nv_bfloat16, 8>& from) {
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&from);
  const __nv_bfloat162 sum = __hadd2(__hadd2(pairs[0], pairs[1]), __hadd2(pairs[2], pairs[3]));
  return __low2float(sum) + __high2float(sum);
}

__device__ __forceinline__ void store_streaming(Vector<__nv_bfloat16, 8>* to, const Vector<__nv_bfloat16, 8>& from) {
  __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&from));
}
__device__ __forceinline__ void store_streaming(Vector<float, 4>* to, const Vector<float, 4>& from) {
  __stcs(reinterpret_cast<float4*>(to), *reinterpret_cast<const float4*>(&from));
}
template <typename T>
__device__ __forceinline__ void store_streaming(Vector<T, 1>* to, const Vector<T, 1>& from) {
  *to = from;
}

// The warps of one block that work on one channel.
struct Team {
  int index, thread, threads;

  __device__ __forceinline__ explicit Team(int thread_bits)
      : index(static_cast<int>(threadIdx.x) >> thread_bits),
        thread(static_cast<int>(threadIdx.x) & ((1 << thread_bits) - 1)), threads(1 << thread_bits) {}
  __device__ __forceinline__ void sync() const {
    if (threads == 32) {
      __syncwarp();
    } else {
      hopper::named_barrier(1 + index, threads);  // teams of two warps or more: at most eight
    }
  }
  // Adds each value over every warp, into `cells`, which are used once; total() adds the warps up, in any thread.
  template <int N>
  __device__ __forceinline__ void gather(float (&values)[N], float* cells) const {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
      }
    }
    cells += index * (threads / 32) * N;
    if (thread % 32 == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        cells[thread / 32 * N + i] = values[i];
      }
    }
    sync();
  }
  template <int N>
  __device__ __forceinline__ void total(float (&values)[N], const float* cells) const {
    cells += index * (threads / 32) * N;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = 0.0f;
      for (int warp = 0; warp < threads / 32; ++warp) {
        values[i] += cells[warp * N + i];
      }
    }
  }
};

// Calls visit(whole, index, start, from, to) for this thread's vectors: vector `index` in shared memory holds the
// tensor's elements from `start` on, of which [from, to) belong to the slice; `whole` is a type that says if all do.
// First the whole vectors of all rows, then their ends; always the same ones for a thread.
template <int V, class Visit>
__device__ __forceinline__ void for_vectors(const Slice<V>& slice, const Team& team, const Visit& visit) {
  int column = team.thread + slice.lead;
  for (int r = column / slice.stride; r < slice.rows; r += column / slice.stride) {
    column %= slice.stride;
    const Row row = slice.row(r);
    const int missing = r == 0 ? slice.lead : 0;  // at the front of the row
    const int begin = missing + (row.phase > 0 ? 1 : 0), end = missing + (row.phase + row.length) / V;
    column += column < begin ? team.threads : 0;
    int index = slice.offset(r) + column - missing;
    int64_t start = row.start - row.phase + static_cast<int64_t>(column - missing) * V;
    for (; column < end; column += team.threads) {
      visit(std::true_type{}, index, start, 0, V);
      index += team.threads;
      start += team.threads * V;
    }
    column += column < slice.stride ? team.threads : 0;
  }
  for (int i = team.thread; V > 1 && i < 2 * slice.rows; i += team.threads) {
    const Row row = slice.row(i / 2);
    const int vectors = slice.vectors_of(row), place = i % 2 == 0 ? 0 : vectors - 1;
    const int from = place == 0 ? row.phase : 0, left = row.phase + row.length - place * V;
    const int to = left < V ? left : V;
    if ((i % 2 == 0 || vectors > 1) && to - from < V) {
      const int64_t start = row.start - row.phase + static_cast<int64_t>(place) * V;
      visit(std::false_type{}, slice.offset(i / 2) + place, start, from, to);
    }
  }
}

// A vector of each tensor as floats; what is not of the slice becomes `fill`.
template <typename T, int V>
struct Tile {
  const Vector<T, V>* s;
  const Vector<T, V>* t;

  template <class Whole>
  __device__ __forceinline__ void read(
      Whole, int index, int from, int to, float fill_s, float fill_t, float (&x)[V], float (&y)[V]) const {
    widen(s[index], x);
    widen(t[index], y);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const bool inside = Whole::value || (i >= from && i < to);
      x[i] = inside ? x[i] : fill_s;
      y[i] = inside ? y[i] : fill_t;
    }
  }
};

// One level's tensors in global memory, of as many elements.
template <typename T>
struct Source {
  const T* s;
  const T* t;
  int64_t elements;
};

// Fetches rows of both tensors with bulk copies, split at stages; warp 0 of the team, a row a lane.
template <typename T, int V>
__device__ __forceinline__ void fetch_rows(
    const Slice<V>& slice, const Team& team, const Source<T>& source, Vector<T, V>* s, Vector<T, V>* t,
    uint64_t* barriers) {
  for (int r = team.thread; r < slice.rows; r += 32) {
    const Row row = slice.row(r);
    const int64_t base = row.start - row.phase;
    const int begin = slice.offset(r), end = begin + slice.bulk_of(row, source.elements);
    for (int from = begin; from < end;) {
      const int stage = from / kStage, limit = (stage + 1) * kStage, to = end < limit ? end : limit;
      const uint32_t bytes = static_cast<uint32_t>(to - from) * kVectorBytes;
      const int64_t place = base + static_cast<int64_t>(from - begin) * V;
      hopper::barrier_expect(barriers + stage, 2 * bytes);
      hopper::bulk_load(s + from, source.s + place, bytes, barriers + stage);
      hopper::bulk_load(t + from, source.t + place, bytes, barriers + stage);
      from = to;
    }
  }
  __syncwarp();
  for (int stage = team.thread; stage * kStage < slice.vectors; stage += 32) {
    hopper::barrier_arrive(barriers + stage);
  }
}

// Loads what no bulk copy may: the elements whose vector reaches past the tensor's end; everything where V = 1.
template <typename T, int V>
__device__ __forceinline__ void load_plainly(
    const Slice<V>& slice, const Team& team, const Source<T>& source, Vector<T, V>* s, Vector<T, V>* t) {
  if constexpr (V == 1) {
    for_vectors(slice, team, [&](auto, int index, int64_t start, int, int) {
      s[index].at[0] = source.s[start];
      t[index].at[0] = source.t[start];
    });
  } else {
    for (int r = slice.rows - 1; r >= 0; --r) {  // one row, or some of less than a vector
      const Row row = slice.row(r);
      const int bulk = slice.bulk_of(row, source.elements), rest = row.phase + row.length - bulk * V;
      if (bulk == slice.vectors_of(row)) {
        return;
      }
      if (team.thread < rest) {
        const int place = slice.offset(r) + bulk;
        const int64_t start = row.start - row.phase + static_cast<int64_t>(bulk) * V + team.thread;
        s[place].at[team.thread] = source.s[start];
        t[place].at[team.thread] = source.t[start];
      }
    }
  }
}

}  // namespace jdkd::pearson::single
