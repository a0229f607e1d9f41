// How the single pass of the Pearson loss is laid over the chip. Pure host code, and the geometry of a block, which the
// kernel shares with the tests.
//
// A channel is N planes of H W elements, and its positions 0 .. N H W - 1 are counted plane after plane. It belongs to
// a team of warps, a power of two: some warps of a block, or all warps of `ranks` neighbouring blocks of a cluster. A
// block holds `teams` channels at once, or `chunk` positions of one. One launch has one cluster size, one block size
// and one amount of shared memory; the planner gives every warp of a launch about as many bytes.
//
// In shared memory a block's part of a plane, a row, begins at the 16-byte boundary of global memory before it, so that
// bulk copies and vectors stay aligned. Rows follow each other at the distance of the widest.
#pragma once

#include <cstdint>
#include <vector>

#ifndef JDKD_HOST_DEVICE
#if defined(__CUDACC__)
#define JDKD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JDKD_HOST_DEVICE inline
#endif
#endif

namespace jdkd::pearson::single {

constexpr int kVectorBytes = 16;
constexpr int kStage = 512;          // vectors of each tensor behind one mbarrier: 16 KB of both
constexpr int kMaxWarps = 16;        // of a block
constexpr int kMaxCluster = 16;
constexpr int kMaxBarriers = 32;     // at most 227 KB / 16 KB stages, and one begun stage a team
constexpr int kFixedBytes = 3072;    // of shared memory, besides the features
constexpr int kMaxLevels = 16;       // of a launch

// One level of a launch. Counted in elements and 16-byte vectors; a channel that fits on the chip fits an int. Powers
// of two are given by their exponents, so that a block finds its place without divisions.
struct Geometry {
  int64_t c;
  int n, hw;
  int rank_bits, team_bits;  // of the blocks that share a channel, of the channels that share a block: one of them is 0
  int thread_bits;           // of the threads of a team in a block
  int chunk;                 // positions of a rank
  int room;                  // vectors of each tensor that a team has in shared memory

  JDKD_HOST_DEVICE int ranks() const { return 1 << rank_bits; }
  JDKD_HOST_DEVICE int teams() const { return 1 << team_bits; }
  JDKD_HOST_DEVICE int stages() const { return (room + kStage - 1) / kStage; }  // of a team
};

// The exponent of a power of two.
inline int bits_of(int64_t power) {
  int bits = 0;
  while ((int64_t{1} << bits) < power) {
    ++bits;
  }
  return bits;
}

// A row of a slice: `length` elements of the tensor from element `start`, which is `phase` elements into a vector.
struct Row {
  int64_t start;
  int length, phase;
};

// What one team of one block holds of each tensor, in vectors of V elements; V = 1 where the tensors are not aligned.
template <int V>
struct Slice {
  int64_t channel, c;
  int first, last;  // positions
  int hw, first_image, rows;
  int stride;   // vectors from row to row
  int lead;     // vectors that the first row lacks at its front
  int vectors;  // from the first row's first to the last row's last

  JDKD_HOST_DEVICE Slice(const Geometry& g, int64_t cluster, int rank, int cluster_size, int team)
      : channel(((cluster * (cluster_size >> g.rank_bits) + (rank >> g.rank_bits)) << g.team_bits) + team),
        c(g.c), hw(g.hw) {
    const int64_t total = static_cast<int64_t>(g.n) * g.hw;
    const int64_t from = static_cast<int64_t>(rank & (g.ranks() - 1)) * g.chunk;
    first = static_cast<int>(from < total ? from : total);
    last = static_cast<int>(from + g.chunk < total ? from + g.chunk : total);
    if (channel >= c || last < first) {
      last = first;
    }
    first_image = first / hw;
    rows = last > first ? (last - 1) / hw - first_image + 1 : 0;
    stride = hw % V == 0 ? hw / V : (hw + 2 * V - 2) / V;
    const int head = rows ? vectors_of(row(0)) : 0;
    lead = rows ? stride - head : 0;
    vectors = rows > 1 ? head + (rows - 2) * stride + vectors_of(row(rows - 1)) : head;
  }

  JDKD_HOST_DEVICE Row row(int r) const {
    const int image = first_image + r, begin = r == 0 ? first - first_image * hw : 0;
    const int64_t left = static_cast<int64_t>(last) - static_cast<int64_t>(image) * hw;
    const int64_t start = (image * c + channel) * hw + begin;
    return {start, static_cast<int>(left < hw ? left : hw) - begin, static_cast<int>(start & (V - 1))};
  }

  JDKD_HOST_DEVICE int vectors_of(const Row& r) const { return (r.phase + r.length + V - 1) / V; }

  // The first vector of row r.
  JDKD_HOST_DEVICE int offset(int r) const { return r == 0 ? 0 : r * stride - lead; }

  // Vectors of a row that lie inside a tensor of `elements`: all, or all but the last.
  JDKD_HOST_DEVICE int bulk_of(const Row& r, int64_t elements) const {
    const int64_t left = elements / V - r.start / V;
    return vectors_of(r) < left ? vectors_of(r) : static_cast<int>(left);
  }
};

struct Shape {
  int64_t n, c, hw;
};

struct Chip {
  int sms;
  int64_t shared_per_block, shared_per_sm;
  int max_cluster;
};

struct LevelPlan {
  int launch = -1;  // -1: a channel does not fit on the chip
  Geometry geometry{};
  int64_t first_cluster = 0, clusters = 0;
};

struct LaunchPlan {
  int cluster = 1, warps = 8, blocks_per_sm = 1;
  int64_t shared_bytes = 0, clusters = 0;
  std::vector<int> levels;  // in the order of their clusters: the fullest blocks first
};

struct Plan {
  std::vector<LevelPlan> levels;
  std::vector<LaunchPlan> launches;

  bool fits() const;
};

Plan make_plan(const std::vector<Shape>& shapes, int itemsize, const Chip& chip);

}  // namespace jdkd::pearson::single
