// The Pearson loss on CUDA in split form: statistics, finish, gradient, each one launch for all levels.
//
// A block of the statistics reduces one chunk, tile by tile. A tile is held in registers and passed over three times:
// means, centred squares, residual; one thread merges its moments into the chunk's in float64. Plain coalesced loads of
// one element a thread, so that alignment never matters.
#pragma once

#include "common/reduce.cuh"
#include "ops/pearson.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace jdkd::pearson {

constexpr int kThreads = 256;
constexpr int kPerThread = 16;                     // elements of each tensor that a thread holds
constexpr int kTile = kThreads * kPerThread;       // positions of a tile of a plane
constexpr int kPlaneChunk = 2 * kTile;             // positions of a chunk at most
constexpr int kRowLanes = kThreads / 32;           // rows that a block reads at once, 32 channels each
constexpr int kRowTile = kRowLanes * kPerThread;   // rows of a tile
constexpr int kRowChunks = 128;                    // chunks of a level, about, at most
constexpr int kMaxLevels = 16;

// One level of a launch. Chunks of a plane or of all rows; blocks, cells and columns count over all levels before it.
struct LevelArgs {
  const void* x;
  const void* y;
  const void* dout;  // may be null
  void* dx;
  double scale;  // weight / C
  int64_t n, c, hw;
  int64_t chunks, chunk;   // of a plane (NCHW) or of all rows (channels-last), and their length
  int64_t first_block, first_cell, first_column;
  bool channels_last;
};

struct Levels {
  LevelArgs at[kMaxLevels];
  int count;
};

__device__ __forceinline__ float as_float(float value) { return value; }
__device__ __forceinline__ float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float as_float(__half value) { return __half2float(value); }
__device__ __forceinline__ void assign(float& to, float value) { to = value; }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void assign(__half& to, float value) { to = __float2half_rn(value); }

__device__ __forceinline__ const LevelArgs& level_of_block(const Levels& levels) {
  int i = levels.count - 1;
  while (i > 0 && static_cast<int64_t>(blockIdx.x) < levels.at[i].first_block) {
    --i;
  }
  return levels.at[i];
}

// Chunk of a plane: image, channel, and the elements [first, last) of the tensor.
struct PlaneChunk {
  int64_t chunk, channel, first, last;

  __device__ explicit PlaneChunk(const LevelArgs& level) {
    const int64_t block = blockIdx.x - level.first_block, plane = block / level.chunks;
    const int64_t piece = block % level.chunks, start = piece * level.chunk;
    chunk = plane / level.c * level.chunks + piece;
    channel = plane % level.c;
    first = plane * level.hw + start;
    last = plane * level.hw + (start + level.chunk < level.hw ? start + level.chunk : level.hw);
  }
};

// Grid: one block a chunk of a plane. Reads: S and T once. Writes: six float64 a chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    pearson_plane_stats_kernel(const __grid_constant__ Levels levels, double* __restrict__ cells) {
  __shared__ float scratch[kThreads / 32 * 4];
  const LevelArgs& level = level_of_block(levels);
  const PlaneChunk where(level);
  const T* s_data = static_cast<const T*>(level.x);
  const T* t_data = static_cast<const T*>(level.y);
  Moments total;
  for (int64_t tile = where.first; tile < where.last; tile += kTile) {
    const int n = static_cast<int>(where.last - tile < kTile ? where.last - tile : kTile);
    float s[kPerThread], t[kPerThread], means[2] = {0.0f, 0.0f}, sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int at = i * kThreads + threadIdx.x;
      s[i] = at < n ? as_float(s_data[tile + at]) : 0.0f;
      t[i] = at < n ? as_float(t_data[tile + at]) : 0.0f;
      means[0] += s[i];
      means[1] += t[i];
    }
    block_sum<kThreads>(means, scratch);
    const float mean_s = means[0] / n, mean_t = means[1] / n;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const bool inside = i * kThreads + threadIdx.x < n;
      s[i] = inside ? s[i] - mean_s : 0.0f;
      t[i] = inside ? t[i] - mean_t : 0.0f;
      sums[0] += s[i];
      sums[1] += t[i];
      sums[2] += s[i] * s[i];
      sums[3] += t[i] * t[i];
    }
    block_sum<kThreads>(sums, scratch);
    const float beta = residual_beta(sums[2], sums[3]);
    float residual[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float rest = s[i] - beta * t[i];
      residual[0] += rest * rest;
    }
    block_sum<kThreads>(residual, scratch);
    if (threadIdx.x == 0) {
      total = merge(
          total, tile_moments(n, mean_s, mean_t, sums[0], sums[1], sums[2], sums[3], beta, residual[0]));
    }
  }
  if (threadIdx.x == 0) {
    store_moments(total, cells + level.first_cell + where.chunk * kMoments * level.c + where.channel, level.c);
  }
}

// Chunk of rows and 32 channels: rows [first, last), and the channel of this thread, which may lie outside.
struct RowChunk {
  int64_t chunk, channel, first, last;

  __device__ explicit RowChunk(const LevelArgs& level) {
    const int64_t block = blockIdx.x - level.first_block, blocks = (level.c + 31) / 32, rows = level.n * level.hw;
    chunk = block / blocks;
    channel = block % blocks * 32 + threadIdx.x % 32;
    first = chunk * level.chunk;
    last = first + level.chunk < rows ? first + level.chunk : rows;
  }
};

// Adds N values of each of a block's 32 channels over its row lanes; every lane gets the totals.
template <int N>
__device__ __forceinline__ void lane_sum(float (&values)[N], float (*scratch)[32]) {
  const int lane = threadIdx.x / 32, column = threadIdx.x % 32;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    scratch[lane * N + i][column] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = 0.0f;
    for (int other = 0; other < kRowLanes; ++other) {
      values[i] += scratch[other * N + i][column];
    }
  }
}

// Grid: one block a chunk of rows and 32 channels. Reads: S and T once. Writes: six float64 a chunk and channel.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    pearson_row_stats_kernel(const __grid_constant__ Levels levels, double* __restrict__ cells) {
  __shared__ float scratch[kRowLanes * 4][32];
  const LevelArgs& level = level_of_block(levels);
  const RowChunk where(level);
  const T* s_data = static_cast<const T*>(level.x);
  const T* t_data = static_cast<const T*>(level.y);
  const int lane = threadIdx.x / 32;
  Moments total;
  for (int64_t tile = where.first; tile < where.last; tile += kRowTile) {
    const int n = static_cast<int>(where.last - tile < kRowTile ? where.last - tile : kRowTile);
    float s[kPerThread], t[kPerThread], means[2] = {0.0f, 0.0f}, sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int row = i * kRowLanes + lane;
      const bool inside = row < n && where.channel < level.c;
      const int64_t at = (tile + row) * level.c + where.channel;
      s[i] = inside ? as_float(s_data[at]) : 0.0f;
      t[i] = inside ? as_float(t_data[at]) : 0.0f;
      means[0] += s[i];
      means[1] += t[i];
    }
    lane_sum(means, scratch);
    const float mean_s = means[0] / n, mean_t = means[1] / n;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const bool inside = i * kRowLanes + lane < n;
      s[i] = inside ? s[i] - mean_s : 0.0f;
      t[i] = inside ? t[i] - mean_t : 0.0f;
      sums[0] += s[i];
      sums[1] += t[i];
      sums[2] += s[i] * s[i];
      sums[3] += t[i] * t[i];
    }
    lane_sum(sums, scratch);
    const float beta = residual_beta(sums[2], sums[3]);
    float residual[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const float rest = s[i] - beta * t[i];
      residual[0] += rest * rest;
    }
    lane_sum(residual, scratch);
    if (lane == 0) {
      total = merge(
          total, tile_moments(n, mean_s, mean_t, sums[0], sums[1], sums[2], sums[3], beta, residual[0]));
    }
  }
  if (lane == 0 && where.channel < level.c) {
    store_moments(total, cells + level.first_cell + where.chunk * kMoments * level.c + where.channel, level.c);
  }
}

// Joins the chunks of every channel. Grid: threads over the channels of all levels.
// Reads: six float64 a chunk and channel. Writes: ten float32, six float64 and one, its share of the loss, a channel.
static __global__ void pearson_finish_kernel(
    const __grid_constant__ Levels levels, const double* __restrict__ cells, float* __restrict__ table,
    double* __restrict__ moments, double* __restrict__ shares, int64_t columns, double eps, bool skip_constant) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= columns) {
    return;
  }
  int i = levels.count - 1;
  while (levels.at[i].first_column > column) {
    --i;
  }
  const LevelArgs& level = levels.at[i];
  const double* own = cells + level.first_cell + column - level.first_column;
  const int64_t chunks = level.channels_last ? level.chunks : level.n * level.chunks;
  Moments total;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    total = merge(total, load_moments(own + chunk * kMoments * level.c, level.c));
  }
  store_moments(total, moments + column, columns);
  shares[column] = finish_channel(total, level.scale, eps, skip_constant, table + column, columns);
}

// The losses from the shares of all channels. Grid: one block. Fixed order: thread by thread, then thread 0.
static __global__ void pearson_sum_kernel(
    const __grid_constant__ Levels levels, const double* __restrict__ shares, float* __restrict__ losses,
    float* __restrict__ loss) {
  __shared__ double partial[kThreads];
  double total = 0;
  for (int i = 0; i < levels.count; ++i) {
    const double* own = shares + levels.at[i].first_column;
    double sum = 0;
    for (int64_t j = threadIdx.x; j < levels.at[i].c; j += kThreads) {
      sum += own[j];
    }
    __syncthreads();
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int thread = 1; thread < kThreads; ++thread) {
        sum += partial[thread];
      }
      losses[i] = static_cast<float>(sum);
      total += sum;
    }
  }
  if (threadIdx.x == 0) {
    *loss = static_cast<float>(total);
  }
}

struct Entry {
  float a, b, k, mean_x, mean_y;

  __device__ Entry(const float* column, int64_t columns)
      : a(column[kA * columns]), b(column[kB * columns]), k(column[kK * columns]),
        mean_x(column[kMeanX * columns]), mean_y(column[kMeanY * columns]) {}
  __device__ __forceinline__ float gradient(float x, float y) const {
    return a * (x - mean_x) + (b * (y - mean_y) + k);
  }
};

// Grid: as the statistics. Reads: X and Y once, five scalars a channel. Writes: dX once.
template <typename T>
__global__ void __launch_bounds__(kThreads) pearson_plane_grad_kernel(
    const __grid_constant__ Levels levels, const float* __restrict__ dloss, const float* __restrict__ table,
    int64_t columns) {
  const LevelArgs& level = level_of_block(levels);
  const PlaneChunk where(level);
  const Entry entry(table + level.first_column + where.channel, columns);
  const float upstream = *dloss;
  const T* x = static_cast<const T*>(level.x);
  const T* y = static_cast<const T*>(level.y);
  const T* dout = static_cast<const T*>(level.dout);
  T* dx = static_cast<T*>(level.dx);
  for (int64_t at = where.first + threadIdx.x; at < where.last; at += kThreads) {
    const float of_loss = upstream * entry.gradient(as_float(x[at]), as_float(y[at]));
    assign(dx[at], dout ? as_float(dout[at]) + of_loss : of_loss);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pearson_row_grad_kernel(
    const __grid_constant__ Levels levels, const float* __restrict__ dloss, const float* __restrict__ table,
    int64_t columns) {
  const LevelArgs& level = level_of_block(levels);
  const RowChunk where(level);
  if (where.channel >= level.c) {
    return;
  }
  const Entry entry(table + level.first_column + where.channel, columns);
  const float upstream = *dloss;
  const T* x = static_cast<const T*>(level.x);
  const T* y = static_cast<const T*>(level.y);
  const T* dout = static_cast<const T*>(level.dout);
  T* dx = static_cast<T*>(level.dx);
  for (int64_t row = where.first + threadIdx.x / 32; row < where.last; row += kRowLanes) {
    const int64_t at = row * level.c + where.channel;
    const float of_loss = upstream * entry.gradient(as_float(x[at]), as_float(y[at]));
    assign(dx[at], dout ? as_float(dout[at]) + of_loss : of_loss);
  }
}

}  // namespace jdkd::pearson
