#include "cpu/convert.h"

#include "common/clones.h"

#include <torch/headeronly/util/Half.h>

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own _mm512_undefined_ps
#endif

namespace jdkd::cpu {
namespace {

// Plain loops, for the compiler to vectorise. bfloat16 is the upper half of a float32.

JDKD_CLONES void widen_bfloat16(const uint16_t* __restrict from, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof(bits));
  }
}

JDKD_CLONES void round_bfloat16(const float* __restrict from, int64_t n, uint16_t* __restrict to) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof(bits));
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u), quiet_nan = bits | 0x400000u;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to[i] = static_cast<uint16_t>((is_nan ? quiet_nan : rounded) >> 16);
  }
}

struct HalfConversions {
  void (*widen)(const uint16_t* from, int64_t n, float* to);
  void (*round)(const float* from, int64_t n, uint16_t* to);
};

void widen_half_scalar(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(from[i]);
  }
}

void round_half_scalar(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = torch::headeronly::detail::fp16_ieee_from_fp32_value(from[i]);
  }
}

// float16 has conversion instructions, which no vector type expresses: one function per instruction set.
#if defined(__x86_64__)
__attribute__((target("avx,f16c"))) void widen_half_f16c(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(bits));
  }
  widen_half_scalar(from + i, n - i, to + i);
}

__attribute__((target("avx,f16c"))) void round_half_f16c(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bits);
  }
  round_half_scalar(from + i, n - i, to + i);
}

#endif

HalfConversions choose_half_conversions() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("f16c")) {
    return {widen_half_f16c, round_half_f16c};
  }
#endif
  return {widen_half_scalar, round_half_scalar};
}

const HalfConversions& half_conversions() {
  static const HalfConversions chosen = choose_half_conversions();
  return chosen;
}

}  // namespace

void copy_floats(Cursor from, int64_t n, float* buffer) {
  switch (from.type) {
    case ScalarType::Float:
      std::memcpy(buffer, from.at, n * sizeof(float));
      return;
    case ScalarType::BFloat16:
      widen_bfloat16(reinterpret_cast<const uint16_t*>(from.at), n, buffer);
      return;
    default:
      half_conversions().widen(reinterpret_cast<const uint16_t*>(from.at), n, buffer);
  }
}

const float* as_floats(Cursor from, int64_t n, float* buffer) {
  if (from.type == ScalarType::Float) {
    return reinterpret_cast<const float*>(from.at);
  }
  copy_floats(from, n, buffer);
  return buffer;
}

void round_floats(const float* from, int64_t n, void* to, ScalarType type) {
  if (type == ScalarType::BFloat16) {
    round_bfloat16(from, n, static_cast<uint16_t*>(to));
  } else {
    half_conversions().round(from, n, static_cast<uint16_t*>(to));
  }
}

}  // namespace jdkd::cpu
