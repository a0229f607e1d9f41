// The Pearson loss and its gradient in a single pass: student and teacher are read once, the gradient is written once.
//
// A team, some warps of a block or all warps of several blocks of a cluster, holds one channel in shared memory
// (ops/pearson_plan.h) and sweeps over it three times:
//   1. sums, behind the bulk copies, stage by stage; they give the block its means, about;
//   2. centred sums around these, corrected for what the means lack; the ranks' moments are joined, in the same order
//      in every block;
//   3. gradient, and the loss as the sum of (s^ - t^)^2 / (2 m), which stays exact as r -> 1.
// The cross sum needs no residual here: the loss does not come from it, and the table is rounded to float32.
#pragma once

#include "cuda/pearson_single_team.cuh"
#include "ops/pearson.h"

namespace jdkd::pearson::single {

struct LevelArgs {
  const void* s;
  const void* t;
  void* ds;
  Geometry geometry;
  int64_t first_column, first_part;
  double scale;  // weight / C
};

struct Args {
  LevelArgs at[kMaxLevels];
  int first_cluster[kMaxLevels];  // past the last level: more than a grid has
  float* table;    // [2, kRows, columns]
  double* parts;   // of the loss, [C, ranks] a level
  int64_t columns;
  double eps;
  bool skip_constant;
};

// What the third sweep needs of a channel.
struct Channel {
  float rows[2 * kRows];      // student's and teacher's entry of the table
  float inv[2], shift;        // s^ - t^ = inv[0] (s - mean_s) - inv[1] (t - mean_t) + shift, with rounded means
  double share;               // of the sum of squares in the loss
};

// Fixed part of a block's shared memory.
struct Fixed {
  uint64_t barriers[kMaxBarriers];
  Moments moments[kMaxWarps];      // of this block's teams
  Channel channels[kMaxWarps];
  float sums[2 * kMaxWarps];       // of every warp: first sweep,
  float centred[5 * kMaxWarps];    // second,
  float squares[kMaxWarps];        // third
};
static_assert(sizeof(Fixed) <= kFixedBytes && kFixedBytes % 128 == 0);

// First and second sweep: the moments of a team's slice, written by its first thread.
template <typename T, int V>
__device__ __forceinline__ void sweep_statistics(
    const Slice<V>& slice, const Team& team, const Tile<T, V>& tile, Fixed& fixed, uint64_t* barriers,
    Moments& moments) {
  if (slice.vectors == 0) {
    if (team.thread == 0) {
      moments = Moments{};
    }
    return;
  }
  float sums[2] = {0.0f, 0.0f};
  int stage = -1;
  for_vectors(slice, team, [&](auto whole, int index, int64_t, int from, int to) {
    if (V > 1 && index / kStage != stage) {
      stage = index / kStage;
      hopper::barrier_wait(barriers + stage);
    }
    if constexpr (decltype(whole)::value) {
      sums[0] += rough_sum(tile.s[index]);
      sums[1] += rough_sum(tile.t[index]);
    } else {
      float x[V], y[V];
      tile.read(whole, index, from, to, 0.0f, 0.0f, x, y);
      sums[0] += pairwise_sum(x);
      sums[1] += pairwise_sum(y);
    }
  });
  team.gather(sums, fixed.sums);
  team.total(sums, fixed.sums);
  const int n = slice.last - slice.first;
  const float mean_s = sums[0] / n, mean_t = sums[1] / n;
  float centred[5] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  for_vectors(slice, team, [&](auto whole, int index, int64_t, int from, int to) {
    float x[V], y[V], ss = 0.0f, tt = 0.0f, st = 0.0f;
    tile.read(whole, index, from, to, mean_s, mean_t, x, y);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      x[i] -= mean_s;
      y[i] -= mean_t;
      ss += x[i] * x[i];
      tt += y[i] * y[i];
      st += x[i] * y[i];
    }
    centred[0] += pairwise_sum(x);
    centred[1] += pairwise_sum(y);
    centred[2] += ss;
    centred[3] += tt;
    centred[4] += st;
  });
  team.gather(centred, fixed.centred);
  if (team.thread == 0) {
    team.total(centred, fixed.centred);
    const double m = n, ds = centred[0] / m, dt = centred[1] / m;
    moments = {
        m, mean_s + ds, mean_t + dt, centred[2] - m * ds * ds, centred[3] - m * dt * dt, centred[4] - m * ds * dt};
  }
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The moments of a channel from those of its ranks, which lane i < ranks reads; the same bits in every lane and block.
__device__ __forceinline__ Moments joined_moments(const Moments* own, int first_rank, int ranks) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Moments q;
  if (lane < ranks) {
    q = ranks == 1 ? *own : *hopper::in_block(own, first_rank + lane);
  }
  const double base_s = __shfl_sync(0xffffffffu, q.mean_s, 0), base_t = __shfl_sync(0xffffffffu, q.mean_t, 0);
  const double n = warp_sum(q.n);
  const double mean_s = base_s + warp_sum(q.n > 0 ? q.n * (q.mean_s - base_s) : 0) / n;
  const double mean_t = base_t + warp_sum(q.n > 0 ? q.n * (q.mean_t - base_t) : 0) / n;
  const double gap_s = q.n > 0 ? q.mean_s - mean_s : 0, gap_t = q.n > 0 ? q.mean_t - mean_t : 0;
  const double ss = warp_sum(q.ss + q.n * gap_s * gap_s), tt = warp_sum(q.tt + q.n * gap_t * gap_t);
  const double st = warp_sum(q.st + q.n * gap_s * gap_t);
  // Clamped so that a NaN stays; without variance there is no covariance.
  return {n, mean_s, mean_t, ss < 0 ? 0 : ss, tt < 0 ? 0 : tt, ss <= 0 || tt <= 0 ? 0 : st};
}

// Even lanes compute the student's side of a channel, odd ones the teacher's; lanes 0 and 1 write.
__device__ __forceinline__ void finish(Moments q, double scale, const Args& args, Channel& channel) {
  const int lane = static_cast<int>(threadIdx.x) % 32, side = lane % 2;
  if (args.skip_constant && is_constant(q, deviation(q.n, q.ss), deviation(q.n, q.tt))) {
    scale = 0;
  }
  const double mean_x = side ? q.mean_t : q.mean_s, xx = side ? q.tt : q.ss;
  const double mean_y = side ? q.mean_s : q.mean_t, yy = side ? q.ss : q.tt;
  const double inv = scale != 0 ? 1 / (deviation(q.n, xx) + args.eps) : 0;
  const double rest = inv * (mean_x - static_cast<float>(mean_x)), other_rest = __shfl_xor_sync(0xffffffffu, rest, 1);
  if (lane < 2) {
    gradient_row(q.n, mean_x, mean_y, xx, yy, q.st, scale, args.eps, channel.rows + side * kRows, 1);
    channel.inv[side] = static_cast<float>(inv);
  }
  if (lane == 0) {
    channel.shift = static_cast<float>(other_rest - rest);
    channel.share = scale / (2 * q.n);
  }
}

// Third sweep: writes the gradient and returns this thread's part of the sum of (s^ - t^)^2.
template <typename T, int V>
__device__ __forceinline__ float write_gradient(
    const Slice<V>& slice, const Team& team, const Tile<T, V>& tile, const Channel& channel, T* ds) {
  const float a = channel.rows[kA], b = channel.rows[kB], k = channel.rows[kK];
  const float mean_s = channel.rows[kMeanX], mean_t = channel.rows[kMeanY];
  const float inv_s = channel.inv[0], inv_t = channel.inv[1], shift = channel.shift;
  float total = 0.0f;
  for_vectors(slice, team, [&](auto whole, int index, int64_t start, int from, int to) {
    float x[V], y[V], square = 0.0f;
    tile.read(whole, index, from, to, mean_s, mean_t, x, y);
    Vector<T, V> gradient;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const bool inside = decltype(whole)::value || (i >= from && i < to);
      const float x_centred = x[i] - mean_s, y_centred = y[i] - mean_t;
      const float gap = inv_s * x_centred + (shift - inv_t * y_centred);
      square += inside ? gap * gap : 0.0f;
      assign(gradient.at[i], a * x_centred + (b * y_centred + k));
    }
    total += square;
    if constexpr (decltype(whole)::value) {
      store_streaming(reinterpret_cast<Vector<T, V>*>(ds + start), gradient);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (i >= from && i < to) {
          ds[start + i] = gradient.at[i];
        }
      }
    }
  });
  return total;
}

// Loss and gradient of all levels of a launch.
// Grid: clusters of blocks, a level after the other; a cluster has one channel, or several.
// Reads: S and T once. Writes: dS once; ten float32 a channel, and one float64 of the loss a channel and rank.
// Numerics: sums in float32, first within a vector and then over at most a few dozen; moments in float64.
// Deterministic: yes. Limits: sm_90; contiguous NCHW; V = 1 unless all tensors begin at 16 bytes.
template <typename T, int V>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) pearson_single_kernel(const __grid_constant__ Args args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const int cluster = hopper::cluster_index(), rank = hopper::cluster_rank(), size = hopper::cluster_size();
  int which = 0;
#pragma unroll
  for (int i = 1; i < kMaxLevels; ++i) {
    which += cluster >= args.first_cluster[i] ? 1 : 0;
  }
  const LevelArgs& level = args.at[which];
  const Team team(level.geometry.thread_bits);
  const Slice<V> slice(level.geometry, cluster - args.first_cluster[which], rank, size, team.index);
  const int ranks = level.geometry.ranks(), first_rank = rank & -ranks;
  const bool works = slice.channel < slice.c;  // else it only keeps the others company
  const int64_t column = level.first_column + slice.channel;

  unsigned char* shared = hopper::dynamic_shared();
  Fixed& fixed = *reinterpret_cast<Fixed*>(shared);
  unsigned char* room = shared + kFixedBytes +
                        static_cast<int64_t>(team.index) * 2 * level.geometry.room * kVectorBytes;
  auto* s = reinterpret_cast<Vector<T, V>*>(room);
  auto* t = reinterpret_cast<Vector<T, V>*>(room + static_cast<int64_t>(level.geometry.room) * kVectorBytes);
  const int stages = level.geometry.stages();
  uint64_t* barriers = fixed.barriers + team.index * stages;
  const Tile<T, V> tile{s, t};
  const Source<T> source{
      static_cast<const T*>(level.s), static_cast<const T*>(level.t), level.geometry.n * level.geometry.c * slice.hw};
  Channel& channel = fixed.channels[team.index];
  Moments& moments = fixed.moments[team.index];

  // Those that are used, dealt out to the warps: the lanes of one would take turns.
  if (V > 1 && threadIdx.x % 32 == 0) {
    for (int i = threadIdx.x / 32; i < stages << level.geometry.team_bits; i += blockDim.x / 32) {
      hopper::barrier_init(fixed.barriers + i, 1);
    }
    hopper::barrier_init_fence();
  }
  __syncthreads();
  if (V > 1 && team.thread < 32) {
    fetch_rows(slice, team, source, s, t, barriers);
  }
  load_plainly(slice, team, source, s, t);
  team.sync();
  sweep_statistics(slice, team, tile, fixed, barriers, moments);
  if (ranks > 1) {
    hopper::cluster_arrive();
    hopper::cluster_wait();
  }
  if (works && team.thread < 32) {
    finish(joined_moments(&moments, first_rank, ranks), level.scale, args, channel);
    __syncwarp();
    if (rank == first_rank && team.thread < 2 * kRows) {
      args.table[team.thread * args.columns + column] = channel.rows[team.thread];
    }
  }
  if (ranks > 1) {
    hopper::cluster_arrive_relaxed();  // has read the others' moments
  }
  if (works) {
    team.sync();
    float square[1] = {write_gradient(slice, team, tile, channel, static_cast<T*>(level.ds))};
    team.gather(square, fixed.squares);
    if (team.thread == 0) {
      team.total(square, fixed.squares);
      args.parts[level.first_part + slice.channel * ranks + rank - first_rank] = square[0] * channel.share;
    }
  }
  if (ranks > 1) {
    hopper::cluster_wait();  // others may still read this block's moments
  }
#endif
}

}  // namespace jdkd::pearson::single
