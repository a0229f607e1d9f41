// How functions of the CPU are compiled for the processors that they meet.
//
// One marked JDKD_CLONES is compiled for AVX-512, for AVX2 with FMA, and for the baseline; the loader picks one when the
// library is loaded. So the build needs no -march and its result runs everywhere. Helpers are always inlined: they take
// the instruction set of what they land in.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define JDKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JDKD_CLONES
#endif
#define JDKD_INLINE static inline __attribute__((always_inline))
#define JDKD_INLINE_MEMBER inline __attribute__((always_inline))
#define JDKD_INLINE_LAMBDA __attribute__((always_inline))

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector crosses a function that is not inlined
