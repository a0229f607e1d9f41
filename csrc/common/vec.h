// Vectors of eight floats in the compiler's own vector types, and the clones that use whatever the processor has. With
// sixteen, compilers pass every value through the stack where a register holds eight.
//
// A function marked JDKD_CLONES is compiled for AVX-512, for AVX2 with FMA, and for the baseline; the loader picks one
// when the library is loaded. So the build needs no -march and its result runs everywhere. Helpers are always inlined:
// they take the instruction set of the clone they land in.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define JDKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JDKD_CLONES
#endif
#define JDKD_INLINE static inline __attribute__((always_inline))
#define JDKD_INLINE_LAMBDA __attribute__((always_inline))

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a function that is not inlined

namespace jdkd {

constexpr int64_t kLanes = 8;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

JDKD_INLINE Vec splat(float value) { return Vec{} + value; }

JDKD_INLINE Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

JDKD_INLINE void store(float* to, const Vec& v) { std::memcpy(to, &v, sizeof(v)); }

// The first n < kLanes values; the other lanes hold `fill`.
JDKD_INLINE Vec load_tail(const float* from, int64_t n, const Vec& fill) {
  float lanes[kLanes];
  std::memcpy(lanes, &fill, sizeof(fill));
  for (int64_t i = 0; i < n; ++i) {
    lanes[i] = from[i];
  }
  return load(lanes);
}

JDKD_INLINE void store_tail(float* to, const Vec& v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = v[i];
  }
}

// Four doubles, half a Vec.
typedef float HalfVec __attribute__((vector_size(kLanes / 2 * sizeof(float))));
typedef double Wide __attribute__((vector_size(kLanes / 2 * sizeof(double))));

JDKD_INLINE Wide widened(const Vec& v, int64_t half) {
  HalfVec part;
  std::memcpy(&part, reinterpret_cast<const char*>(&v) + half * sizeof(part), sizeof(part));
  return __builtin_convertvector(part, Wide);
}

JDKD_INLINE double sum_lanes(const Vec& v) {
  const Wide sum = widened(v, 0) + widened(v, 1);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Adds the lanes to totals in float64.
JDKD_INLINE void add_to(double* totals, const Vec& v) {
  for (int64_t half = 0; half < 2; ++half) {
    Wide sum;
    std::memcpy(&sum, totals + half * (kLanes / 2), sizeof(sum));
    sum += widened(v, half);
    std::memcpy(totals + half * (kLanes / 2), &sum, sizeof(sum));
  }
}

// How many of a vector's lanes a loop handles, for bodies written once: all, or the first n.
struct Full {
  inline __attribute__((always_inline)) Vec load(const float* from) const { return jdkd::load(from); }
  inline __attribute__((always_inline)) void store(float* to, const Vec& v) const { jdkd::store(to, v); }
  inline __attribute__((always_inline)) void add_to(double* totals, const Vec& v) const { jdkd::add_to(totals, v); }
};

struct Tail {
  int64_t n;
  inline __attribute__((always_inline)) Vec load(const float* from) const { return load_tail(from, n, Vec{}); }
  inline __attribute__((always_inline)) void store(float* to, const Vec& v) const { store_tail(to, v, n); }
  inline __attribute__((always_inline)) void add_to(double* totals, const Vec& v) const {
    for (int64_t i = 0; i < n; ++i) {
      totals[i] += v[i];
    }
  }
};

}  // namespace jdkd
