// Vectors of float32 of one instruction set, and how they come from and go to memory of each element type.
//
// Included once for each instruction set by pearson_sweeps.cpp, in a namespace and under a target of its own, so
// without a guard: JDKD_LANES is the number of floats of a vector, 16 for AVX-512 and 8 for AVX2; where it is undefined
// the code is plain and compiles anywhere. Intrinsics, since the compilers' own vector types convert half precision
// through the stack. `All` handles all lanes of a vector, a `Some` the first n.

#if JDKD_LANES == 16

constexpr int64_t kLanes = 16;
using Vec = __m512;

JDKD_INLINE Vec splat(float value) { return _mm512_set1_ps(value); }

struct All {
  JDKD_INLINE_MEMBER Vec load(const float* from) const { return _mm512_loadu_ps(from); }
  JDKD_INLINE_MEMBER Vec load(const BFloat16* from) const {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  JDKD_INLINE_MEMBER Vec load(const Half* from) const {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  JDKD_INLINE_MEMBER void store(float* to, const Vec& v) const { _mm512_storeu_ps(to, v); }
  JDKD_INLINE_MEMBER void store(BFloat16* to, const Vec& v) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(v));
  }
  JDKD_INLINE_MEMBER void store(Half* to, const Vec& v) const {
    const __m256i bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  }

  // As bfloat16, to nearest even; a NaN stays one.
  static JDKD_INLINE_MEMBER __m256i rounded(const Vec& v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    sum = _mm512_mask_or_epi32(sum, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
  }
};

struct Some {
  __mmask16 lanes;

  explicit JDKD_INLINE_MEMBER Some(int64_t n) : lanes(static_cast<__mmask16>((1u << n) - 1)) {}
  JDKD_INLINE_MEMBER Vec load(const float* from) const { return _mm512_maskz_loadu_ps(lanes, from); }
  JDKD_INLINE_MEMBER Vec load(const BFloat16* from) const {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
  }
  JDKD_INLINE_MEMBER Vec load(const Half* from) const {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, from));
  }
  JDKD_INLINE_MEMBER void store(float* to, const Vec& v) const { _mm512_mask_storeu_ps(to, lanes, v); }
  JDKD_INLINE_MEMBER void store(BFloat16* to, const Vec& v) const {
    _mm256_mask_storeu_epi16(to, lanes, All::rounded(v));
  }
  JDKD_INLINE_MEMBER void store(Half* to, const Vec& v) const {
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // v in its lanes, zeros in the others.
  JDKD_INLINE_MEMBER Vec only(const Vec& v) const { return _mm512_maskz_mov_ps(lanes, v); }
};

JDKD_INLINE __m512d low(const Vec& v) { return _mm512_cvtps_pd(_mm512_castps512_ps256(v)); }
JDKD_INLINE __m512d high(const Vec& v) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)); }

JDKD_INLINE double sum_lanes(const Vec& v) { return _mm512_reduce_add_pd(_mm512_add_pd(low(v), high(v))); }

// Adds lanes to totals in float64.
JDKD_INLINE void add_to(double* totals, const Vec& v, All) {
  _mm512_storeu_pd(totals, _mm512_add_pd(_mm512_loadu_pd(totals), low(v)));
  _mm512_storeu_pd(totals + 8, _mm512_add_pd(_mm512_loadu_pd(totals + 8), high(v)));
}

JDKD_INLINE void add_to(double* totals, const Vec& v, Some some) {
  const __mmask8 first = static_cast<__mmask8>(some.lanes), last = static_cast<__mmask8>(some.lanes >> 8);
  _mm512_mask_storeu_pd(totals, first, _mm512_add_pd(_mm512_maskz_loadu_pd(first, totals), low(v)));
  _mm512_mask_storeu_pd(totals + 8, last, _mm512_add_pd(_mm512_maskz_loadu_pd(last, totals + 8), high(v)));
}

#else

constexpr int64_t kLanes = 8;

#if JDKD_LANES == 8

using Vec = __m256;

JDKD_INLINE Vec splat(float value) { return _mm256_set1_ps(value); }

struct All {
  JDKD_INLINE_MEMBER Vec load(const float* from) const { return _mm256_loadu_ps(from); }
  JDKD_INLINE_MEMBER Vec load(const BFloat16* from) const {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  JDKD_INLINE_MEMBER Vec load(const Half* from) const {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  JDKD_INLINE_MEMBER void store(float* to, const Vec& v) const { _mm256_storeu_ps(to, v); }
  JDKD_INLINE_MEMBER void store(BFloat16* to, const Vec& v) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(sum, quiet, is_nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }
  JDKD_INLINE_MEMBER void store(Half* to, const Vec& v) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

#else

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

JDKD_INLINE Vec splat(float value) { return Vec{} + value; }

typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Upper __attribute__((vector_size(kLanes * sizeof(uint16_t))));

// The bits of one type as another of the same size.
template <class To, class From>
JDKD_INLINE To as(const From& from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct All {
  JDKD_INLINE_MEMBER Vec load(const float* from) const {
    Vec v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  }
  JDKD_INLINE_MEMBER Vec load(const BFloat16* from) const {
    Upper upper;
    std::memcpy(&upper, from, sizeof(upper));
    return as<Vec>(__builtin_convertvector(upper, Bits) << 16);
  }
  JDKD_INLINE_MEMBER Vec load(const Half* from) const {
    Vec v;
    for (int64_t i = 0; i < kLanes; ++i) {
      v[i] = static_cast<float>(from[i]);
    }
    return v;
  }
  JDKD_INLINE_MEMBER void store(float* to, const Vec& v) const { std::memcpy(to, &v, sizeof(v)); }
  JDKD_INLINE_MEMBER void store(BFloat16* to, const Vec& v) const {
    const Bits bits = as<Bits>(v), is_nan = as<Bits>(v != v);
    const Bits sum = bits + 0x7fffu + ((bits >> 16) & 1u), quiet = bits | 0x400000u;
    const Upper upper = __builtin_convertvector(((sum & ~is_nan) | (quiet & is_nan)) >> 16, Upper);
    std::memcpy(to, &upper, sizeof(upper));
  }
  JDKD_INLINE_MEMBER void store(Half* to, const Vec& v) const {
    for (int64_t i = 0; i < kLanes; ++i) {
      to[i] = static_cast<Half>(v[i]);
    }
  }
};

#endif

struct Some {
  int64_t n;

  explicit JDKD_INLINE_MEMBER Some(int64_t count) : n(count) {}
  template <class T>
  JDKD_INLINE_MEMBER Vec load(const T* from) const {
    T lanes[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      lanes[i] = from[i];
    }
    return All{}.load(lanes);
  }
  template <class T>
  JDKD_INLINE_MEMBER void store(T* to, const Vec& v) const {
    T lanes[kLanes];
    All{}.store(lanes, v);
    for (int64_t i = 0; i < n; ++i) {
      to[i] = lanes[i];
    }
  }
  JDKD_INLINE_MEMBER Vec only(const Vec& v) const {
    float lanes[kLanes];
    All{}.store(lanes, v);
    return load(lanes);
  }
};

JDKD_INLINE double sum_lanes(const Vec& v) {
  float lanes[kLanes];
  All{}.store(lanes, v);
  double sum = 0;
  for (int64_t i = 0; i < kLanes; ++i) {
    sum += lanes[i];
  }
  return sum;
}

// Adds lanes to totals in float64.
#if JDKD_LANES == 8
JDKD_INLINE void add_to(double* totals, const Vec& v, All) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
  _mm256_storeu_pd(totals, _mm256_add_pd(_mm256_loadu_pd(totals), low));
  _mm256_storeu_pd(totals + 4, _mm256_add_pd(_mm256_loadu_pd(totals + 4), high));
}
#else
JDKD_INLINE void add_to(double* totals, const Vec& v, All) {
  for (int64_t i = 0; i < kLanes; ++i) {
    totals[i] += v[i];
  }
}
#endif

JDKD_INLINE void add_to(double* totals, const Vec& v, Some some) {
  float lanes[kLanes];
  All{}.store(lanes, v);
  for (int64_t i = 0; i < some.n; ++i) {
    totals[i] += lanes[i];
  }
}

#endif
