// Rows of channels, channels-last: statistics and gradient of a chunk of rows, some neighbouring channels wide.
//
// A thread takes kWidth neighbouring channels: sixteen bytes, or one element where channels or addresses are no
// multiple of that. kColumns threads lie side by side in a row; the others take the rows below.
#pragma once

#include "cuda/pearson_levels.cuh"

namespace jdkd::pearson {

template <int kThreadWidth, int kThreadColumns, int kThreadRows>
struct RowShape {
  static constexpr int kWidth = kThreadWidth, kColumns = kThreadColumns;
  static constexpr int kHeld = kThreadRows;  // rows of a tile that a thread holds
  static constexpr int kChannels = kWidth * kColumns;  // of a block
  static constexpr int kLanes = kThreads / kColumns;   // rows at once
  static constexpr int kTileRows = kLanes * kHeld;
  // Floats of scratch: four sums of every warp, their totals, betas.
  static constexpr int kTotals = kThreads / 32 * 4 * kChannels, kBetas = kTotals + 4 * kChannels;
  static constexpr int kScratch = kBetas + kChannels;
};

template <typename T>
using WideRows = RowShape<Pack<T>::kCount, kWideColumns, kPacks>;
using NarrowRows = RowShape<1, kNarrowColumns, 8>;

// Where a block works: rows [first, last), and the first channel of this thread, which may lie outside.
template <class Shape>
struct RowChunk {
  int64_t chunk, channel, first, last;
  int lane, column;  // the thread's row of a tile, and its first channel of the block's

  __device__ __forceinline__ explicit RowChunk(const LevelArgs& level)
      : lane(threadIdx.x / Shape::kColumns), column(threadIdx.x % Shape::kColumns * Shape::kWidth) {
    const int64_t block = blockIdx.x - level.first_block, across = (level.c + Shape::kChannels - 1) / Shape::kChannels;
    chunk = block / across;
    channel = block % across * Shape::kChannels + column;
    first = chunk * level.chunk;
    last = min(first + level.chunk, level.n * level.hw);
  }
};

// Sums over a block's rows of one value of each of its channels, several of them at a time: `put` every one, then
// `add`. In a fixed order.
template <class Shape, int N>
struct ColumnSums {
  static constexpr int kWarps = kThreads / 32, kSums = N * Shape::kChannels;
  float* scratch;

  __device__ __forceinline__ void put(int which, float (&values)[Shape::kWidth], int column) const {
    warp_sum<Shape::kColumns>(values);
    if (threadIdx.x % 32 < Shape::kColumns) {
#pragma unroll
      for (int e = 0; e < Shape::kWidth; ++e) {
        scratch[threadIdx.x / 32 * kSums + which * Shape::kChannels + column + e] = values[e];
      }
    }
  }
  // The totals, [N, kChannels]. They stand until the next sums are added.
  __device__ __forceinline__ const float* add() const {
    float* totals = scratch + Shape::kTotals;
    __syncthreads();
    for (int i = threadIdx.x; i < kSums; i += kThreads) {
      float total = 0;
      for (int warp = 0; warp < kWarps; ++warp) {
        total += scratch[warp * kSums + i];
      }
      totals[i] = total;
    }
    __syncthreads();
    return totals;
  }
};

// The rows of a tile that a thread holds of one tensor.
template <typename T, class Shape>
struct RowTile {
  Pack<T, Shape::kWidth> rows[Shape::kHeld];

  __device__ __forceinline__ RowTile(const T* data, int64_t c, int held) {
#pragma unroll
    for (int i = 0; i < Shape::kHeld; ++i) {
      if (i < held) {
        rows[i].load(data + i * Shape::kLanes * c, true);
      }
    }
  }
};

// Calls body(i, e) for every element a thread holds: row i, channel e.
template <class Shape, class Body>
__device__ __forceinline__ void for_held(int held, const Body& body) {
#pragma unroll
  for (int i = 0; i < Shape::kHeld; ++i) {
    if (i < held) {
#pragma unroll
      for (int e = 0; e < Shape::kWidth; ++e) {
        body(i, e);
      }
    }
  }
}

template <typename T, class Shape>
__device__ __forceinline__ void put_sums(
    const RowTile<T, Shape>& x, int held, int column, const ColumnSums<Shape, 2>& sums, int which) {
  float total[Shape::kWidth] = {};
  for_held<Shape>(held, [&](int i, int e) { total[e] += x.rows[i][e]; });
  sums.put(which, total, column);
}

// The sums of what is left after the mean, and of its squares: entries `which` and 2 + `which`.
template <typename T, class Shape>
__device__ __forceinline__ void put_centred(
    const RowTile<T, Shape>& x, const float (&mean)[Shape::kWidth], int held, int column,
    const ColumnSums<Shape, 4>& sums, int which) {
  float total[Shape::kWidth] = {}, squares[Shape::kWidth] = {};
  for_held<Shape>(held, [&](int i, int e) {
    const float d = x.rows[i][e] - mean[e];
    total[e] += d;
    squares[e] += d * d;
  });
  sums.put(which, total, column);
  sums.put(2 + which, squares, column);
}

// Joins one tile of n <= kTileRows rows to the moments of channel threadIdx.x < kChannels, which are in shared memory.
// The pointers are at the thread's first row and channel, and it holds `held` rows.
template <typename T, class Shape>
__device__ __forceinline__ void add_row_tile(
    Moments* moments, const T* s_data, const T* t_data, int64_t c, int n, int held, int column, float* scratch) {
  constexpr int kWidth = Shape::kWidth, kChannels = Shape::kChannels;
  const RowTile<T, Shape> s(s_data, c, held), t(t_data, c, held);
  const int own = min(static_cast<int>(threadIdx.x), kChannels - 1);
  const float share = 1.0f / n;
  const ColumnSums<Shape, 2> sums{scratch};
  put_sums(s, held, column, sums, 0);
  put_sums(t, held, column, sums, 1);
  const float* totals = sums.add();
  float means_s[kWidth], means_t[kWidth], betas[kWidth], residual[kWidth] = {};
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    means_s[e] = totals[column + e] * share;
    means_t[e] = totals[kChannels + column + e] * share;
  }
  const float mean_s = totals[own] * share, mean_t = totals[kChannels + own] * share;
  const ColumnSums<Shape, 4> centred{scratch};
  put_centred(s, means_s, held, column, centred, 0);
  put_centred(t, means_t, held, column, centred, 1);
  centred.add();
  const float ds = totals[own], dt = totals[kChannels + own];
  const float ss = totals[2 * kChannels + own], tt = totals[3 * kChannels + own], beta = residual_beta(ss, tt);
  float* all_betas = scratch + Shape::kBetas;
  if (threadIdx.x < kChannels) {
    all_betas[threadIdx.x] = beta;
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    betas[e] = all_betas[column + e];
  }
  for_held<Shape>(held, [&](int i, int e) {
    const float rest = (s.rows[i][e] - means_s[e]) - betas[e] * (t.rows[i][e] - means_t[e]);
    residual[e] += rest * rest;
  });
  const ColumnSums<Shape, 1> last{scratch};
  last.put(0, residual, column);
  last.add();
  if (threadIdx.x < kChannels) {
    const Moments more = tile_moments(n, mean_s, mean_t, ds, dt, ss, tt, beta, totals[own]);
    moments[threadIdx.x] = merge(moments[threadIdx.x], more);
  }
}

template <typename T, class Shape>
__device__ __forceinline__ void row_stats(const LevelArgs& level, Moments* cells, Moments* moments, float* scratch) {
  const RowChunk<Shape> where(level);
  const int64_t start = where.lane * level.c + where.channel;
  if (threadIdx.x < Shape::kChannels) {
    moments[threadIdx.x] = {};
  }
  for (int64_t row = where.first; row < where.last; row += Shape::kTileRows) {
    const int n = static_cast<int>(min(where.last - row, static_cast<int64_t>(Shape::kTileRows)));
    const int held = where.channel < level.c ? (n - where.lane + Shape::kLanes - 1) / Shape::kLanes : 0;
    const T* s_data = static_cast<const T*>(level.x) + row * level.c + start;
    const T* t_data = static_cast<const T*>(level.y) + row * level.c + start;
    add_row_tile<T, Shape>(moments, s_data, t_data, level.c, n, held, where.column, scratch);
  }
  const int64_t channel = where.channel - where.column + threadIdx.x;
  if (threadIdx.x < Shape::kChannels && channel < level.c) {
    cells[level.first_cell + channel * level.chunks + where.chunk] = moments[threadIdx.x];
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
