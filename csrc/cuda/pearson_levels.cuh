// The Pearson loss on CUDA in split form: how the work of all levels is laid over the blocks of one launch.
//
// A level is cut into chunks, of planes [H W] or of rows [N H W, C], whose moments lie in cells [C, chunks]. A block
// finds its level and its chunks from its index.
#pragma once

#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "ops/pearson.h"

namespace jdkd::pearson {

constexpr int kThreads = 256;
constexpr int kPlaneChunk = 16384;    // positions of a chunk of a plane at most
constexpr int kSmallPlane = 2048;     // positions of a plane that one warp reduces alone
constexpr int kRowBlock = 128;        // rows that the length of a chunk of rows is a multiple of
constexpr int64_t kRowChunk = 2048;   // and at most
constexpr int kMaxLevels = 16;        // of a launch
constexpr int kWideColumns = 8;       // threads side by side in a row of channels: 128 bytes
constexpr int kNarrowColumns = 32;    // the same, where each takes one element

// How a level's blocks work.
enum class Form : int {
  kPlanes,       // a block takes a chunk of a plane
  kSmallPlanes,  // a warp takes a plane
  kWideRows,     // a block takes a chunk of rows, 128 bytes of channels wide
  kNarrowRows,   // the same with 32 channels, where channels or addresses are no multiple of sixteen bytes
};

// One level of a launch. Blocks, cells and columns count over all levels before it.
struct LevelArgs {
  const void* x;
  const void* y;
  const void* dout;  // may be null
  void* dx;
  double scale;  // weight / C
  int64_t n, c, hw;
  int64_t chunks, chunk;  // of a plane or of all rows, and their length
  int64_t first_block, first_cell, first_column;
  Form form;
  int index;  // among the levels of the call

  __host__ __device__ bool is_rows() const { return form == Form::kWideRows || form == Form::kNarrowRows; }
  // Of a channel.
  __host__ __device__ int64_t cells() const { return is_rows() ? chunks : n * chunks; }
};

struct Levels {
  LevelArgs at[kMaxLevels];
  int count;
};

__device__ __forceinline__ const LevelArgs& level_of_block(const Levels& levels) {
  int i = 0;  // the largest level, of most blocks
  while (i + 1 < levels.count && static_cast<int64_t>(blockIdx.x) >= levels.at[i + 1].first_block) {
    ++i;
  }
  return levels.at[i];
}

// The gradient of an element from five scalars of its channel.
struct Entry {
  float a, b, k, mean_x, mean_y;

  Entry() = default;
  __device__ __forceinline__ Entry(const float* column, int64_t columns)
      : a(column[kA * columns]), b(column[kB * columns]), k(column[kK * columns]),
        mean_x(column[kMeanX * columns]), mean_y(column[kMeanY * columns]) {}
  __device__ __forceinline__ float gradient(float x, float y) const {
    return a * (x - mean_x) + (b * (y - mean_y) + k);
  }
};

}  // namespace jdkd::pearson
