// Rows of channels, channels-last: statistics and gradient of a chunk of rows, some neighbouring channels wide.
//
// A thread takes kWidth neighbouring channels: sixteen bytes, or one element where channels or addresses are no
// multiple of that. kColumns threads lie side by side in a row; the others take the rows below.
#pragma once

#include "cuda/pearson_sweep.cuh"

namespace jdkd::pearson {

template <int kThreadWidth, int kThreadColumns, int kThreadRows>
struct RowShape {
  static constexpr int kWidth = kThreadWidth, kColumns = kThreadColumns;
  static constexpr int kHeld = kThreadRows;            // rows that a thread of the statistics asks for at once
  static constexpr int kChannels = kWidth * kColumns;  // of a block
  static constexpr int kLanes = kThreads / kColumns;   // rows at once
  // Floats of scratch: the sums of every warp, and both means and beta of every channel.
  static constexpr int kAbout = kThreads / 32 * ChunkSums::kCount * kChannels, kScratch = kAbout + 3 * kChannels;
};

template <typename T>
using WideRows = RowShape<Pack<T>::kCount, kWideColumns, 2>;
using NarrowRows = RowShape<1, kNarrowColumns, 4>;

// Where a block works: rows [first, last), and the first channel of this thread, which may lie outside.
template <class Shape>
struct RowChunk {
  int64_t chunk, channel, first, last;
  int lane, column;  // the thread's row of those at once, and its first channel of the block's

  __device__ __forceinline__ explicit RowChunk(const LevelArgs& level)
      : lane(threadIdx.x / Shape::kColumns), column(threadIdx.x % Shape::kColumns * Shape::kWidth) {
    const int64_t block = blockIdx.x - level.first_block, across = (level.c + Shape::kChannels - 1) / Shape::kChannels;
    chunk = block / across;
    channel = block % across * Shape::kChannels + column;
    first = chunk * level.chunk;
    last = min(first + level.chunk, level.n * level.hw);
  }
};

// Sums over a block's rows of N values of each of its channels: `put` every one, and after a barrier `total` says what
// the warps have put in all. In a fixed order.
template <class Shape, int N>
struct ColumnSums {
  float* scratch;

  __device__ __forceinline__ void put(int which, float (&values)[Shape::kWidth], int column) const {
    warp_sum<Shape::kColumns>(values);
    if (threadIdx.x % 32 < Shape::kColumns) {
#pragma unroll
      for (int e = 0; e < Shape::kWidth; ++e) {
        scratch[(threadIdx.x / 32 * N + which) * Shape::kChannels + column + e] = values[e];
      }
    }
  }
  // Of value `i / kChannels` of channel `i % kChannels`.
  __device__ __forceinline__ float total(int i) const {
    float total = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      total += scratch[warp * N * Shape::kChannels + i];
    }
    return total;
  }
};

// The moments of channel threadIdx.x < kChannels of the block. As of a plane: means, about, and beta from a sample,
// then all sums around these means. Each warp walks over a stretch of rows of its own; its first ones are the sample.
template <typename T, class Shape>
__device__ __forceinline__ Moments row_moments(
    const T* s, const T* t, int64_t c, int rows, bool is_inside, int column, float* scratch) {
  constexpr int kWidth = Shape::kWidth, kChannels = Shape::kChannels, kWarps = kThreads / 32;
  static_assert(2 * kChannels <= kThreads);
  using Packs = PairPacks<T, kWidth, Shape::kHeld, 32 / Shape::kColumns, true>;
  const int stretch = (rows + kWarps - 1) / kWarps, begin = threadIdx.x / 32 * stretch;
  const int last = is_inside ? min(begin + stretch, rows) - 1 : -1;
  const int first = begin + threadIdx.x % 32 / Shape::kColumns;
  const int sampled = rows / stretch * min(stretch, Packs::kStep) + min(rows % stretch, Packs::kStep);
  float* means = scratch + Shape::kAbout;
  float* betas = means + 2 * kChannels;
  const auto load = [&](Packs& packs, int from) { packs.load(s, t, c, from, last); };
  Packs held, next;
  if (last >= 0) {
    load(held, first);
    load(next, first + Packs::kStep);
  }
  const ColumnSums<Shape, 2> sampling{scratch};
  const auto put_sample = [&](const auto& of) {  // of(e, s, t): two values to be summed
    float values[2][kWidth] = {};
    held.template visit<Shape::kHeld>(false, first, last, [&](int e, float x, float y) {
      const float2 more = of(e, x, y);
      values[0][e] += more.x;
      values[1][e] += more.y;
    });
    sampling.put(0, values[0], column);
    sampling.put(1, values[1], column);
    __syncthreads();
  };
  put_sample([](int, float x, float y) { return float2{x, y}; });
  if (threadIdx.x < 2 * kChannels) {
    means[threadIdx.x] = sampling.total(threadIdx.x) / sampled;
  }
  __syncthreads();
  ChunkSums sums[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    sums[e].mean_s = means[column + e];
    sums[e].mean_t = means[kChannels + column + e];
  }
  put_sample([&](int e, float x, float y) {
    const float ds = x - sums[e].mean_s, dt = y - sums[e].mean_t;
    return float2{ds * ds, dt * dt};
  });
  if (threadIdx.x < kChannels) {
    betas[threadIdx.x] = residual_beta(sampling.total(threadIdx.x), sampling.total(kChannels + threadIdx.x));
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    sums[e].beta = betas[column + e];
  }
  sweep(held, next, begin, first, last, load, [&](int e, float x, float y) { sums[e].add(x, y); });
  const ColumnSums<Shape, ChunkSums::kCount> all{scratch};
#pragma unroll
  for (int which = 0; which < ChunkSums::kCount; ++which) {
    float values[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      values[e] = sums[e].of[which];
    }
    all.put(which, values, column);
  }
  __syncthreads();
  if (threadIdx.x >= kChannels) {
    return {};
  }
  const int own = threadIdx.x;
  const auto total = [&](int which) { return all.total(which * kChannels + own); };
  return tile_moments(
      rows, means[own], means[kChannels + own], total(0), total(1), total(2), total(3), betas[own], total(4), total(5));
}

template <typename T, class Shape>
__device__ __forceinline__ void row_stats(const LevelArgs& level, Moments* cells, float* scratch) {
  const RowChunk<Shape> where(level);
  const int64_t start = where.first * level.c + where.channel, own = where.channel - where.column + threadIdx.x;
  const T* s = static_cast<const T*>(level.x) + start;
  const T* t = static_cast<const T*>(level.y) + start;
  const int rows = static_cast<int>(where.last - where.first);
  const Moments total = row_moments<T, Shape>(s, t, level.c, rows, where.channel < level.c, where.column, scratch);
  if (threadIdx.x < Shape::kChannels && own < level.c) {
    cells[level.first_cell + own * level.chunks + where.chunk] = total;
  }
}

// The rows that a thread computes at once, from its first channel on; past the last one it is the last once more.
template <typename T, class Shape>
struct RowBatch {
  static constexpr int kWidth = Shape::kWidth, kHeld = 2, kStep = Shape::kLanes * kHeld;
  Pack<T, kWidth> x[kHeld], y[kHeld], added[kHeld];

  __device__ __forceinline__ void load(
      const T* x_at, const T* y_at, const T* dout, int64_t c, int64_t first, int64_t last) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t at = min(first + i * Shape::kLanes, last - 1) * c;
      x[i].load(x_at + at, true);
      y[i].load(y_at + at, true);
      if (dout) {
        added[i].load(dout + at, true);
      }
    }
  }
};

// The first features are asked for before the table is, which is as far away.
template <typename T, class Shape>
__device__ __forceinline__ void row_gradient(
    const LevelArgs& level, const float* upstream, const float* table, int64_t columns) {
  using Batch = RowBatch<T, Shape>;
  constexpr int kWidth = Shape::kWidth;
  const RowChunk<Shape> where(level);
  if (where.channel >= level.c) {
    return;
  }
  const T* x = static_cast<const T*>(level.x) + where.channel;
  const T* y = static_cast<const T*>(level.y) + where.channel;
  const T* dout = level.dout ? static_cast<const T*>(level.dout) + where.channel : nullptr;
  T* dx = static_cast<T*>(level.dx) + where.channel;
  Batch batch;
  batch.load(x, y, dout, level.c, where.first + where.lane, where.last);
  Entry entries[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    entries[e] = Entry(table + level.first_column + where.channel + e, columns);
  }
  const float factor = *upstream;
  for (int64_t first = where.first + where.lane; first < where.last; first += Batch::kStep) {
#pragma unroll
    for (int i = 0; i < Batch::kHeld; ++i) {
      const int64_t row = first + i * Shape::kLanes;
      if (row < where.last) {
        float result[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const float of_loss = factor * entries[e].gradient(batch.x[i][e], batch.y[i][e]);
          result[e] = dout ? batch.added[i][e] + of_loss : of_loss;
        }
        batch.x[i].round(result);
        batch.x[i].store(dx + row * level.c, true);
      }
    }
    batch.load(x, y, dout, level.c, first + Batch::kStep, where.last);
  }
}

}  // namespace jdkd::pearson
