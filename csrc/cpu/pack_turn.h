// Rows of a contiguous kernel, whose taps are innermost, to and from packed order, where columns are.
//
// `run` is [n, taps] of the shared side; `cells` is [taps, n] of the packed side, its taps `pitch` elements apart.
#pragma once

#include <cstdint>

namespace jdkd::cpu {

// cells = run
void turn_in(float* run, int64_t n, int64_t taps, float* cells, int64_t pitch);

// run += cells
void turn_add(float* run, int64_t n, int64_t taps, float* cells, int64_t pitch);

// run = cells
void turn_set(float* run, int64_t n, int64_t taps, float* cells, int64_t pitch);

}  // namespace jdkd::cpu
