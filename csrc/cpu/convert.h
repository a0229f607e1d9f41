// Half-precision tensors at the edges of the CPU kernels, which compute in float32.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace jdkd::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// A typed position in a tensor; + counts elements.
struct Cursor {
  const char* at;
  ScalarType type;

  Cursor(const void* data, ScalarType scalar_type)
      : at(static_cast<const char*>(data)), type(scalar_type) {}
  int64_t itemsize() const { return type == ScalarType::Float ? 4 : 2; }
  Cursor operator+(int64_t elements) const {
    return {at + elements * itemsize(), type};
  }
};

// n values as float32: float32 is returned where it lies, the others are widened into buffer (n floats).
const float* as_floats(Cursor from, int64_t n, float* buffer);

// The same, always into buffer.
void copy_floats(Cursor from, int64_t n, float* buffer);

// Rounds n values, to nearest even, and writes them where `to` points, as bfloat16 or float16.
void round_floats(const float* from, int64_t n, void* to, ScalarType type);

}  // namespace jdkd::cpu
