// Planes of one channel, NCHW: statistics and gradient of a chunk, by a block or by a warp (`kTeam` threads).
//
// A plane begins wherever the one before it ends. The body of a chunk, from the first sixteen bytes that lie whole in
// it, is read and written in packs; fewer than two packs of elements at its edges, before and after, one by one.
#pragma once

#include "cuda/pearson_levels.cuh"

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

// The elements that a thread holds of one tile: kPacks packs of each tensor, and in the first tile one of the edges.
template <typename T, int kTeam>
struct PlaneTile {
  static constexpr int kCount = Pack<T>::kCount, kStep = kTeam * kCount;
  Pack<T> s[kPacks], t[kPacks];
  T s_edge, t_edge;
  int packs;  // that this thread holds
  bool has_edge = false;

  // `left`: packs that the chunk still has from the pointers, the thread's first, on.
  __device__ __forceinline__ void load(const T* s_at, const T* t_at, int left, bool wide_t) {
    packs = (left + kTeam - 1) / kTeam;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (i < packs) {
        s[i].load(s_at + i * kStep, true);
        t[i].load(t_at + i * kStep, wide_t);
      }
    }
  }

  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (i < packs) {
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          body(s[i][e], t[i][e]);
        }
      }
    }
    if (has_edge) {
      body(as_float(s_edge), as_float(t_edge));
    }
  }
};

template <typename T, int kTeam>
__device__ __forceinline__ void plane_stats(const LevelArgs& level, Moments* cells, Moments* totals, float* scratch) {
  const PlaneChunk<kTeam> where(level);
  if (where.n == 0) {
    return;
  }
  const int lane = where.lane;
  const T* s_at = static_cast<const T*>(level.x) + where.first;
  const T* t_at = static_cast<const T*>(level.y) + where.first;
  const Split<T> split(s_at, where.n);
  PlaneTile<T, kTeam> tile;
  if (lane < split.edges) {
    tile.has_edge = true;
    tile.s_edge = s_at[split.edge(lane)];
    tile.t_edge = t_at[split.edge(lane)];
  }
  Moments* out = cells + where.cell(level);
  Moments& total = totals[threadIdx.x / kTeam];  // in shared memory: only one lane needs it
  if (lane == 0) {
    total = {};
  }
  const bool wide_t = is_pack_aligned(t_at + split.head);
  s_at += split.head + lane * Pack<T>::kCount;
  t_at += split.head + lane * Pack<T>::kCount;
  int left = split.packs, edges = split.edges;
  do {
    tile.load(s_at, t_at, left - lane, wide_t);
    const int n = min(left, kTeam * kPacks) * Pack<T>::kCount + edges;
    float means[2] = {}, sums[4] = {}, residual[1] = {};
    tile.for_each([&](float s, float t) {
      means[0] += s;
      means[1] += t;
    });
    team_sum<kTeam>(means, scratch);
    const float mean_s = means[0] / n, mean_t = means[1] / n;
    tile.for_each([&](float s, float t) {
      const float ds = s - mean_s, dt = t - mean_t;
      sums[0] += ds;
      sums[1] += dt;
      sums[2] += ds * ds;
      sums[3] += dt * dt;
    });
    team_sum<kTeam>(sums, scratch);
    const float beta = residual_beta(sums[2], sums[3]);
    tile.for_each([&](float s, float t) {
      const float rest = (s - mean_s) - beta * (t - mean_t);
      residual[0] += rest * rest;
    });
    team_sum<kTeam>(residual, scratch);
    if (lane == 0) {
      total = merge(
          total, tile_moments(n, mean_s, mean_t, sums[0], sums[1], sums[2], sums[3], beta, residual[0]));
    }
    left -= kTeam * kPacks;
    edges = 0;
    tile.has_edge = false;
    s_at += kPacks * tile.kStep;
    t_at += kPacks * tile.kStep;
  } while (left > 0);
  if (lane == 0) {
    *out = total;
  }
}

template <typename T, int kTeam>
__device__ __forceinline__ void plane_gradient(
    const LevelArgs& level, float upstream, const float* table, int64_t columns) {
  constexpr int kCount = Pack<T>::kCount, kBatch = 2;  // packs of each tensor in flight
  const PlaneChunk<kTeam> where(level);
  if (where.n == 0) {
    return;
  }
  const Entry entry(table + level.first_column + where.channel(level), columns);
  const T* x = static_cast<const T*>(level.x) + where.first;
  const T* y = static_cast<const T*>(level.y) + where.first;
  const T* dout = level.dout ? static_cast<const T*>(level.dout) + where.first : nullptr;
  T* dx = static_cast<T*>(level.dx) + where.first;
  const Split<T> split(x, where.n);
  const bool wide_y = is_pack_aligned(y + split.head), wide_dx = is_pack_aligned(dx + split.head);
  const bool wide_dout = is_pack_aligned(dout + split.head);
  for (int first = where.lane; first < split.packs; first += kTeam * kBatch) {
    Pack<T> xs[kBatch], ys[kBatch], added[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = split.head + (first + i * kTeam) * kCount;
      if (first + i * kTeam < split.packs) {
        xs[i].load(x + at, true);
        ys[i].load(y + at, wide_y);
        if (dout) {
          added[i].load(dout + at, wide_dout);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kTeam < split.packs) {
        float result[kCount];
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          const float of_loss = upstream * entry.gradient(xs[i][e], ys[i][e]);
          result[e] = dout ? added[i][e] + of_loss : of_loss;
        }
        xs[i].round(result);
        xs[i].store(dx + split.head + (first + i * kTeam) * kCount, wide_dx);
      }
    }
  }
  if (where.lane < split.edges) {
    const int at = split.edge(where.lane);
    const float of_loss = upstream * entry.gradient(as_float(x[at]), as_float(y[at]));
    assign(dx[at], dout ? as_float(dout[at]) + of_loss : of_loss);
  }
}

}  // namespace jdkd::pearson
