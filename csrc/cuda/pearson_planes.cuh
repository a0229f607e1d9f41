// Planes of one channel, NCHW: statistics and gradient of a chunk, by a block or by a warp (`kTeam` threads).
//
// A plane begins wherever the one before it ends. The body of a chunk, from the first sixteen bytes that lie whole in
// it, is read and written in packs; fewer than two packs of elements at its edges, before and after, one by one.
#pragma once

#include "cuda/pearson_sweep.cuh"

namespace jdkd::pearson {

// Where a team works: `n` elements from `first` on.
template <int kTeam>
struct PlaneChunk {
  int64_t plane, piece, first;
  int n, lane;

  __device__ __forceinline__ explicit PlaneChunk(const LevelArgs& level) : lane(threadIdx.x % kTeam) {
    const int64_t team = (blockIdx.x - level.first_block) * (kThreads / kTeam) + threadIdx.x / kTeam;
    plane = team / level.chunks;
    piece = team % level.chunks;
    const int64_t start = piece * level.chunk;
    first = plane * level.hw + start;
    n = plane < level.n * level.c ? static_cast<int>(min(level.chunk, level.hw - start)) : 0;
  }
  __device__ __forceinline__ int64_t channel(const LevelArgs& level) const { return plane % level.c; }
  __device__ __forceinline__ int64_t cell(const LevelArgs& level) const {
    return level.first_cell + channel(level) * level.cells() + plane / level.c * level.chunks + piece;
  }
};

// How the elements of a chunk that begins at `x` fall into packs: [head | packs | tail]; head and tail are the edges.
template <typename T>
struct Split {
  static constexpr int kCount = Pack<T>::kCount;
  int head, packs, edges;

  __device__ __forceinline__ Split(const T* x, int n) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(x) % kPackBytes / sizeof(T));
    head = min(n, past ? kCount - past : 0);
    packs = (n - head) / kCount;
    edges = n - packs * kCount;
  }
  // The place of an edge's element, i < edges.
  __device__ __forceinline__ int edge(int i) const { return i < head ? i : packs * kCount + i; }
};

template <int kTeam, int N>
__device__ __forceinline__ void team_sum(float (&values)[N], float* scratch) {
  if constexpr (kTeam == 32) {
    warp_sum(values);
  } else {
    block_sum<kTeam>(values, scratch);
  }
}

// Means, about, and beta from a sample, then all sums around these means. Each warp walks over a stretch of its own, so
// that the sample, the first packs of every thread and the edges, comes from all over a chunk: where its beginning is a
// padded corner, sums around that would lose digits. A small plane has one warp; half of it or more is its sample.
template <typename T, int kTeam, bool kWide>
__device__ __forceinline__ Moments plane_moments(
    const T* s, const T* t, const Split<T>& split, int n, int lane, float* scratch) {
  constexpr int kCount = Pack<T>::kCount, kHeld = 2, kSampled = kTeam == 32 ? kHeld : 8 / kCount;
  using Packs = PairPacks<T, kCount, kHeld, 32, kWide>;
  const T* s_body = s + split.head;
  const T* t_body = t + split.head;
  const int stretch = (split.packs + kTeam / 32 - 1) / (kTeam / 32), begin = lane / 32 * stretch;
  const int last = min(begin + stretch, split.packs) - 1;
  const bool has_edge = lane < split.edges;
  const int first = begin + lane % 32;
  const auto load = [&](Packs& packs, int from) { packs.load(s_body, t_body, kCount, from, last); };
  Packs held, next;
  if (last >= 0) {
    load(held, first);
    load(next, first + Packs::kStep);
  }
  const float s_edge = has_edge ? as_float(s[split.edge(lane)]) : 0.0f;
  const float t_edge = has_edge ? as_float(t[split.edge(lane)]) : 0.0f;
  const auto for_sample = [&](const auto& body) {
    held.template visit<kSampled>(false, first, last, body);
    if (kTeam == 32) {
      next.template visit<kHeld>(false, first + Packs::kStep, last, body);
    }
    if (has_edge) {
      body(0, s_edge, t_edge);
    }
  };
  float means[3] = {}, squares[2] = {};  // and the size of the sample
  for_sample([&](int, float x, float y) {
    means[0] += x;
    means[1] += y;
    means[2] += 1.0f;
  });
  team_sum<kTeam>(means, scratch);
  ChunkSums sums{means[0] / means[2], means[1] / means[2], 1.0f};
  for_sample([&](int, float x, float y) {
    squares[0] += (x - sums.mean_s) * (x - sums.mean_s);
    squares[1] += (y - sums.mean_t) * (y - sums.mean_t);
  });
  team_sum<kTeam>(squares, scratch);
  sums.beta = residual_beta(squares[0], squares[1]);
  if (has_edge) {
    sums.add(s_edge, t_edge);
  }
  sweep(held, next, begin, first, last, load, [&](int, float x, float y) { sums.add(x, y); });
  team_sum<kTeam>(sums.of, scratch);
  return lane != 0 ? Moments{} : tile_moments(
      n, sums.mean_s, sums.mean_t, sums.of[0], sums.of[1], sums.of[2], sums.of[3], sums.beta, sums.of[4], sums.of[5]);
}

template <typename T, int kTeam>
__device__ __forceinline__ void plane_stats(const LevelArgs& level, Moments* cells, float* scratch) {
  const PlaneChunk<kTeam> where(level);
  if (where.n == 0) {
    return;
  }
  const T* s = static_cast<const T*>(level.x) + where.first;
  const T* t = static_cast<const T*>(level.y) + where.first;
  const Split<T> split(s, where.n);
  const bool wide = is_pack_aligned(t + split.head);
  const Moments total = wide ? plane_moments<T, kTeam, true>(s, t, split, where.n, where.lane, scratch)
                             : plane_moments<T, kTeam, false>(s, t, split, where.n, where.lane, scratch);
  if (where.lane == 0) {
    cells[where.cell(level)] = total;
  }
}

// The packs of a chunk that a thread computes at once; past the last one it is the last once more, see PairPacks.
template <typename T, int kTeam, bool kWide>
struct PlaneBatch {
  static constexpr int kCount = Pack<T>::kCount, kHeld = 2, kStep = kTeam * kHeld;
  Pack<T> x[kHeld], y[kHeld], added[kHeld];

  // Packs `first`, `first` + kTeam and so on of `packs`, which begin at the pointers.
  __device__ __forceinline__ void load(const T* x_at, const T* y_at, const T* dout, int first, int packs) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int at = min(first + i * kTeam, packs - 1) * kCount;
      x[i].load(x_at + at, true);
      y[i].load(y_at + at, kWide);
      if (dout) {
        added[i].load(dout + at, kWide);
      }
    }
  }

  template <class Gradient>
  __device__ __forceinline__ void store(const Gradient& gradient, bool adds, T* dx, int first, int packs) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * kTeam < packs) {
        float result[kCount];
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          result[e] = gradient(x[i][e], y[i][e], adds ? added[i][e] : 0.0f);
        }
        x[i].round(result);
        x[i].store(dx + (first + i * kTeam) * kCount, kWide);
      }
    }
  }
};

// The first features and the edges are asked for before the table is, which is as far away.
template <typename T, int kTeam, bool kWide>
__device__ __forceinline__ void write_plane(
    const T* x, const T* y, const T* dout, T* dx, const Split<T>& split, int lane, const float* upstream,
    const float* column, int64_t columns) {
  using Batch = PlaneBatch<T, kTeam, kWide>;
  Batch batch;
  const int head = split.head, edge = split.edge(lane);
  const bool has_edge = lane < split.edges;
  if (split.packs > 0) {
    batch.load(x + head, y + head, dout ? dout + head : nullptr, lane, split.packs);
  }
  const float x_edge = has_edge ? as_float(x[edge]) : 0.0f, y_edge = has_edge ? as_float(y[edge]) : 0.0f;
  const float dout_edge = has_edge && dout ? as_float(dout[edge]) : 0.0f;
  const Entry entry(column, columns);
  const float factor = *upstream;
  const auto gradient = [&](float s, float t, float added) {
    const float of_loss = factor * entry.gradient(s, t);
    return dout ? added + of_loss : of_loss;
  };
  for (int first = lane; first < split.packs; first += Batch::kStep) {
    batch.store(gradient, dout != nullptr, dx + head, first, split.packs);
    batch.load(x + head, y + head, dout ? dout + head : nullptr, first + Batch::kStep, split.packs);
  }
  if (has_edge) {
    assign(dx[edge], gradient(x_edge, y_edge, dout_edge));
  }
}

template <typename T, int kTeam>
__device__ __forceinline__ void plane_gradient(
    const LevelArgs& level, const float* upstream, const float* table, int64_t columns) {
  const PlaneChunk<kTeam> where(level);
  if (where.n == 0) {
    return;
  }
  const T* x = static_cast<const T*>(level.x) + where.first;
  const T* y = static_cast<const T*>(level.y) + where.first;
  const T* dout = level.dout ? static_cast<const T*>(level.dout) + where.first : nullptr;
  T* dx = static_cast<T*>(level.dx) + where.first;
  const Split<T> split(x, where.n);
  const bool wide = is_pack_aligned(y + split.head) && is_pack_aligned(dx + split.head) &&
      (dout == nullptr || is_pack_aligned(dout + split.head));
  const float* column = table + level.first_column + where.channel(level);
  if (wide) {
    write_plane<T, kTeam, true>(x, y, dout, dx, split, where.lane, upstream, column, columns);
  } else {
    write_plane<T, kTeam, false>(x, y, dout, dx, split, where.lane, upstream, column, columns);
  }
}

}  // namespace jdkd::pearson
