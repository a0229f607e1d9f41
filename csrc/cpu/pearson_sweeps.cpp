#include "cpu/pearson_sweeps.h"

#include "common/clones.h"

#include <cstdlib>
#include <cstring>
#include <string_view>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define JDKD_BY_PROCESSOR 1
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns about its own _mm512_undefined_ps
#endif

// The loops are compiled for AVX-512, for AVX2 with FMA, and plainly; the processor decides when they are first asked
// for, and ATEN_CPU_CAPABILITY as it does for torch's. So the build needs no -march and its result runs everywhere.

namespace jdkd::cpu {
namespace {

// How far ahead contiguous loops ask for memory, or 0. An Intel Xeon's own prefetch leaves half precision short of what
// a core can read; an AMD EPYC's does not, and asking loses there. See csrc/README.md.
int64_t bytes_ahead() {
#if JDKD_BY_PROCESSOR
  static const int64_t bytes = __builtin_cpu_is("intel") ? 2048 : 0;
  return bytes;
#else
  return 0;
#endif
}

}  // namespace

#if JDKD_BY_PROCESSOR
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define JDKD_LANES 16
namespace v4 {
#include "cpu/lanes.h"
#include "cpu/pearson_loops.h"
}  // namespace v4
#undef JDKD_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define JDKD_LANES 8
namespace v3 {
#include "cpu/lanes.h"
#include "cpu/pearson_loops.h"
}  // namespace v3
#undef JDKD_LANES
#pragma GCC pop_options
#endif

namespace plain {
#include "cpu/lanes.h"
#include "cpu/pearson_loops.h"
}  // namespace plain

#if JDKD_BY_PROCESSOR
namespace {

const Sweeps& chosen() {
  const char* given = std::getenv("ATEN_CPU_CAPABILITY");  // torch's own: default, avx2 or avx512
  const std::string_view most = given ? given : "avx512";
  if (most == "default") {
    return plain::kSweeps;
  }
  if (most != "avx2" && __builtin_cpu_supports("x86-64-v4")) {
    return v4::kSweeps;
  }
  return __builtin_cpu_supports("x86-64-v3") ? v3::kSweeps : plain::kSweeps;
}

}  // namespace
#endif

const Sweeps& sweeps() {
#if JDKD_BY_PROCESSOR
  static const Sweeps& own = chosen();
  return own;
#else
  return plain::kSweeps;
#endif
}

}  // namespace jdkd::cpu
