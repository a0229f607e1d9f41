#include "cpu/convert.h"

#include "common/vec.h"

#include <torch/headeronly/util/Half.h>

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own _mm512_undefined_ps
#endif

namespace jdkd::cpu {
namespace {

typedef uint16_t Bits16 __attribute__((vector_size(kLanes * 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kLanes * 4)));

// bfloat16 is the upper half of a float32.
JDKD_INLINE Bits32 widen(const Bits16& bits) { return __builtin_convertvector(bits, Bits32) << 16; }

JDKD_INLINE Bits16 round_to_bfloat16(const Bits32& bits) {
  const Bits32 rounded = (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
  const Bits32 quiet_nan = (bits >> 16) | 0x40u;
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return __builtin_convertvector(is_nan ? quiet_nan : rounded, Bits16);
}

JDKD_CLONES void widen_bfloat16(const uint16_t* from, int64_t n, float* to) {
  Bits16 bits;
  Bits32 wide;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    std::memcpy(&bits, from + i, sizeof(bits));
    wide = widen(bits);
    std::memcpy(to + i, &wide, sizeof(wide));
  }
  for (; i < n; ++i) {
    const uint32_t one = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &one, sizeof(one));
  }
}

JDKD_CLONES void widen_rows_bfloat16(const uint16_t* from, int64_t stride, int64_t rows, float* to) {
  Bits16 bits;
  Bits32 wide;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < kSlab; i += kLanes) {
      std::memcpy(&bits, from + r * stride + i, sizeof(bits));
      wide = widen(bits);
      std::memcpy(to + r * kSlab + i, &wide, sizeof(wide));
    }
  }
}

JDKD_CLONES void round_bfloat16(const float* from, int64_t n, uint16_t* to) {
  Bits16 bits;
  Bits32 wide = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    std::memcpy(&wide, from + i, sizeof(wide));
    bits = round_to_bfloat16(wide);
    std::memcpy(to + i, &bits, sizeof(bits));
  }
  if (i < n) {
    std::memcpy(&wide, from + i, (n - i) * sizeof(float));
    bits = round_to_bfloat16(wide);
    std::memcpy(to + i, &bits, (n - i) * sizeof(uint16_t));
  }
}

struct HalfConversions {
  void (*widen)(const uint16_t* from, int64_t n, float* to);
  void (*widen_rows)(const uint16_t* from, int64_t stride, int64_t rows, float* to);
  void (*round)(const float* from, int64_t n, uint16_t* to);
};

void widen_half_scalar(const uint16_t* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(from[i]);
  }
}

void widen_rows_half_scalar(const uint16_t* from, int64_t stride, int64_t rows, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    widen_half_scalar(from + r * stride, kSlab, to + r * kSlab);
  }
}

void round_half_scalar(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = torch::headeronly::detail::fp16_ieee_from_fp32_value(from[i]);
  }
}

// float16 has conversion instructions, which no vector type expresses: one function per instruction set.
#if defined(__x86_64__)
__attribute__((target("avx512f"))) void widen_half_avx512(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(bits));
  }
  widen_half_scalar(from + i, n - i, to + i);
}

__attribute__((target("avx512f"))) void widen_rows_half_avx512(
    const uint16_t* from, int64_t stride, int64_t rows, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + r * stride));
    _mm512_storeu_ps(to + r * kSlab, _mm512_cvtph_ps(bits));
  }
}

__attribute__((target("avx512f"))) void round_half_avx512(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i bits = _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), bits);
  }
  round_half_scalar(from + i, n - i, to + i);
}

__attribute__((target("avx,f16c"))) void widen_half_f16c(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(bits));
  }
  widen_half_scalar(from + i, n - i, to + i);
}

__attribute__((target("avx,f16c"))) void widen_rows_half_f16c(
    const uint16_t* from, int64_t stride, int64_t rows, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < kSlab; i += 8) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * stride + i));
      _mm256_storeu_ps(to + r * kSlab + i, _mm256_cvtph_ps(bits));
    }
  }
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
  if (__builtin_cpu_supports("avx512f")) {
    return {widen_half_avx512, widen_rows_half_avx512, round_half_avx512};
  }
  if (__builtin_cpu_supports("f16c")) {
    return {widen_half_f16c, widen_rows_half_f16c, round_half_f16c};
  }
#endif
  return {widen_half_scalar, widen_rows_half_scalar, round_half_scalar};
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

void widen_rows(Cursor from, int64_t stride, int64_t rows, float* to) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from.at);
  if (from.type == ScalarType::BFloat16) {
    widen_rows_bfloat16(bits, stride, rows, to);
  } else {
    half_conversions().widen_rows(bits, stride, rows, to);
  }
}

void round_floats(const float* from, int64_t n, void* to, ScalarType type) {
  if (type == ScalarType::BFloat16) {
    round_bfloat16(from, n, static_cast<uint16_t*>(to));
  } else {
    half_conversions().round(from, n, static_cast<uint16_t*>(to));
  }
}

}  // namespace jdkd::cpu
