// The Pearson loss on CUDA in split form: statistics and finish in the forward, one launch in the backward, each for
// all levels.
//
// A chunk is read once: a sample of it gives the means, about, and beta, and all is summed around them. A warp joins
// the chunks of a channel, and the last block to have done so adds up the loss.
#pragma once

#include "common/ticket.cuh"
#include "cuda/pearson_planes.cuh"
#include "cuda/pearson_rows.cuh"

namespace jdkd::pearson {

// What the finish adds up: every channel's share of the loss, and the sum over the levels of earlier launches; and what
// tells which of its blocks is the last.
struct Totals {
  double* shares;    // [columns]
  double* before;    // one
  unsigned* ticket;  // one; the statistics set it to 0
  float* losses;     // [levels of the call]
  float* loss;       // one
  bool is_first;     // of the call's launches: `before` holds nothing yet
};

// Before the finish begins; its blocks count themselves.
__device__ __forceinline__ void reset(unsigned* ticket) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *ticket = 0;
  }
}

// What: the moments of every chunk, of planes (NCHW) or of rows (channels-last).
// Grid: one block a chunk, or eight small planes; the largest level first.
// Reads: S and T once. Writes: six float64 a chunk and channel, and the ticket of the finish.
// Numerics: float32 within a chunk, around the mean of a sample; float64 beyond. Deterministic: sums in a fixed order.
// Limits: both tensors of one dtype; any address.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    pearson_plane_stats_kernel(
        const __grid_constant__ Levels levels, Moments* __restrict__ cells, unsigned* __restrict__ ticket) {
  __shared__ float scratch[kThreads / 32 * 6];
  reset(ticket);
  const LevelArgs& level = level_of_block(levels);
  if (level.form == Form::kPlanes) {
    plane_stats<T, kThreads>(level, cells, scratch);
  } else {
    plane_stats<T, 32>(level, cells, scratch);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    pearson_row_stats_kernel(
        const __grid_constant__ Levels levels, Moments* __restrict__ cells, unsigned* __restrict__ ticket) {
  __shared__ float scratch[WideRows<T>::kScratch];
  reset(ticket);
  static_assert(WideRows<T>::kScratch >= NarrowRows::kScratch);
  const LevelArgs& level = level_of_block(levels);
  if (level.form == Form::kWideRows) {
    row_stats<T, WideRows<T>>(level, cells, scratch);
  } else {
    row_stats<T, NarrowRows>(level, cells, scratch);
  }
}

__device__ __forceinline__ Moments from_lane_below(const Moments& q, int offset) {
  constexpr unsigned kAll = 0xffffffffu;
  return {
      __shfl_down_sync(kAll, q.n, offset),  __shfl_down_sync(kAll, q.mean_s, offset),
      __shfl_down_sync(kAll, q.mean_t, offset), __shfl_down_sync(kAll, q.ss, offset),
      __shfl_down_sync(kAll, q.tt, offset), __shfl_down_sync(kAll, q.st, offset)};
}

// The losses of the launch's levels from the shares of their channels, added to those before. By one block, a warp a
// level. In a fixed order: lane by lane, a tree, level by level.
__device__ __forceinline__ void add_up(const Levels& levels, const Totals& totals) {
  constexpr int kShares = 8;  // of a thread under way
  __shared__ double of_level[kMaxLevels];
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < levels.count; i += kThreads / 32) {
    const double* own = totals.shares + levels.at[i].first_column;
    const int64_t last = levels.at[i].c - 1;
    double total = 0;
    for (int64_t first = lane; first <= last; first += 32 * kShares) {
      double share[kShares];
#pragma unroll
      for (int j = 0; j < kShares; ++j) {
        share[j] = __ldcg(own + min(first + 32 * j, last));  // of other blocks
      }
#pragma unroll
      for (int j = 0; j < kShares; ++j) {
        total += first + 32 * j <= last ? share[j] : 0;
      }
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      total += __shfl_down_sync(0xffffffffu, total, offset);
    }
    if (lane == 0) {
      totals.losses[levels.at[i].index] = static_cast<float>(total);
      of_level[i] = total;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = totals.is_first ? 0 : *totals.before;
    for (int level = 0; level < levels.count; ++level) {
      total += of_level[level];
    }
    *totals.before = total;
    *totals.loss = static_cast<float>(total);
  }
}

// What: joins the chunks of every channel; the last block adds up the losses. Grid: a warp a channel of the launch's
// levels. Reads: six float64 a chunk and channel. Writes: ten float32, six float64 and one, its share of the loss, a
// channel; one float32 a level, and the loss.
// Deterministic: lane by lane, then a tree; whichever block is the last, it adds in the same order.
static __global__ void __launch_bounds__(kThreads) pearson_finish_kernel(
    const __grid_constant__ Levels levels, const Moments* __restrict__ cells, float* __restrict__ table,
    double* __restrict__ moments, const Totals totals, int64_t columns, double eps, bool skip_constant) {
  const int lane = threadIdx.x % 32;
  int64_t channel = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  int i = 0;
  while (i < levels.count && channel >= levels.at[i].c) {
    channel -= levels.at[i++].c;
  }
  if (i < levels.count) {
    const LevelArgs& level = levels.at[i];
    const int64_t count = level.cells();
    const Moments* own = cells + level.first_cell + channel * count;
    Moments total;
    if (lane < count) {
      total = own[lane];
    }
    for (int64_t chunk = lane + 32; chunk < count; chunk += 32) {
      total = merge(total, own[chunk]);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
      if (offset < count) {  // else those below hold nothing
        total = merge(total, from_lane_below(total, offset));
      }
    }
    if (lane == 0) {
      const int64_t column = level.first_column + channel;
      store_moments(total, moments + column, columns);
      totals.shares[column] = finish_channel(total, level.scale, eps, skip_constant, table + column, columns);
    }
  }
  if (is_last_block(totals.ticket)) {
    add_up(levels, totals);
  }
}

// What: dx = dout + dloss (a (x - mean_x) + b (y - mean_y) + k). Grid: as the statistics.
// Reads: X, Y and, where there is one, dout once, five scalars a channel. Writes: dX once.
// Numerics: float32, rounded once. Deterministic. Limits: X, Y and dout of one dtype; any address.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3) pearson_plane_grad_kernel(
    const __grid_constant__ Levels levels, const float* __restrict__ dloss, const float* __restrict__ table,
    int64_t columns) {
  const LevelArgs& level = level_of_block(levels);
  if (level.form == Form::kPlanes) {
    plane_gradient<T, kThreads>(level, dloss, table, columns);
  } else {
    plane_gradient<T, 32>(level, dloss, table, columns);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) pearson_row_grad_kernel(
    const __grid_constant__ Levels levels, const float* __restrict__ dloss, const float* __restrict__ table,
    int64_t columns) {
  const LevelArgs& level = level_of_block(levels);
  if (level.form == Form::kWideRows) {
    row_gradient<T, WideRows<T>>(level, dloss, table, columns);
  } else {
    row_gradient<T, NarrowRows>(level, dloss, table, columns);
  }
}

}  // namespace jdkd::pearson
