#include "ops/pearson_plan.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <stdexcept>

namespace jdkd::pearson::single {
namespace {

constexpr int64_t kReserved = 1024;  // shared memory that the system takes of every block
constexpr std::array<int, 3> kBlocksPerSm = {3, 2, 1};  // the most that still fits: stores overlap the others' loads

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int warps_of_block(int blocks_per_sm) { return blocks_per_sm == 1 ? 16 : 8; }

int64_t feature_bytes(const Geometry& g) { return static_cast<int64_t>(g.teams()) * 2 * g.room * kVectorBytes; }

// A level whose channels have `span` warps each, or nothing if an index would not fit an int.
std::optional<Geometry> lay_out(const Shape& shape, int itemsize, int warps, int span) {
  const int64_t total = shape.n * shape.hw, vector = kVectorBytes / itemsize;
  if (shape.hw > std::numeric_limits<int>::max() / shape.n / 2) {
    return std::nullopt;
  }
  const int ranks = std::max(span / warps, 1), teams = std::max(warps / span, 1);
  // Whole planes if they can be dealt out evenly; else cuts at 128 bytes.
  int64_t chunk = total / ranks;
  if (shape.n % ranks != 0) {
    chunk = ceil_div(ceil_div(total, ranks), 8 * vector) * 8 * vector;
  }
  const int64_t rows = chunk % shape.hw == 0 ? chunk / shape.hw : (chunk + shape.hw - 2) / shape.hw + 1;
  const int64_t padding = shape.hw % vector == 0 ? 0 : std::min(rows, shape.n) * (2 * vector - 2);
  const int64_t room = ceil_div(std::min(chunk, ceil_div(total, vector) * vector) + padding, vector);
  return Geometry{
      shape.c, static_cast<int>(shape.n), static_cast<int>(shape.hw), bits_of(ranks), bits_of(teams),
      bits_of(32 * std::min(span, warps)), static_cast<int>(chunk), static_cast<int>(room)};
}

// The fewest warps a channel whose bytes fit a block at this occupancy, or 0.
int fewest_warps(const Shape& shape, int itemsize, const Chip& chip, int blocks_per_sm) {
  const int warps = warps_of_block(blocks_per_sm);
  const int64_t budget =
      std::min(chip.shared_per_block, chip.shared_per_sm / blocks_per_sm - kReserved) - kFixedBytes;
  for (int span = 1; span <= warps * chip.max_cluster; span *= 2) {
    const std::optional<Geometry> g = lay_out(shape, itemsize, warps, span);
    if (g && feature_bytes(*g) <= budget) {
      return span;
    }
  }
  return 0;
}

// Lays the levels of one launch out with `spans` warps a channel.
LaunchPlan assemble(
    const std::vector<Shape>& shapes, int itemsize, int blocks_per_sm, const std::vector<int>& members,
    const std::vector<int>& spans, std::vector<LevelPlan>& levels) {
  LaunchPlan launch;
  launch.blocks_per_sm = blocks_per_sm;
  launch.warps = warps_of_block(blocks_per_sm);
  launch.levels = members;
  int64_t bytes = 0;
  for (int i : members) {
    const Geometry g = *lay_out(shapes[i], itemsize, launch.warps, spans[i]);
    levels[i].geometry = g;
    launch.cluster = std::max(launch.cluster, g.ranks());
    bytes = std::max(bytes, feature_bytes(g));
  }
  launch.shared_bytes = kFixedBytes + bytes;
  std::stable_sort(launch.levels.begin(), launch.levels.end(), [&](int a, int b) {
    return feature_bytes(levels[a].geometry) > feature_bytes(levels[b].geometry);
  });
  for (int i : launch.levels) {
    const Geometry& g = levels[i].geometry;
    levels[i].first_cluster = launch.clusters;
    levels[i].clusters = ceil_div(g.c, static_cast<int64_t>(launch.cluster / g.ranks()) * g.teams());
    launch.clusters += levels[i].clusters;
  }
  return launch;
}

void check_arguments(const std::vector<Shape>& shapes, int itemsize, const Chip& chip) {
  const bool known = itemsize == 2 || itemsize == 4;
  const bool power = chip.max_cluster >= 1 && chip.max_cluster <= kMaxCluster &&
                     (chip.max_cluster & (chip.max_cluster - 1)) == 0;
  if (!known || !power) {
    throw std::invalid_argument("pearson_plan: itemsize must be 2 or 4, and max_cluster a power of two up to 16");
  }
  for (const Shape& shape : shapes) {
    if (shape.n < 1 || shape.c < 1 || shape.hw < 1) {
      throw std::invalid_argument("pearson_plan: every level must be (N, C, H W), all positive");
    }
  }
}

}  // namespace

bool Plan::fits() const {
  return std::all_of(levels.begin(), levels.end(), [](const LevelPlan& level) { return level.launch >= 0; });
}

Plan make_plan(const std::vector<Shape>& shapes, int itemsize, const Chip& chip) {
  check_arguments(shapes, itemsize, chip);
  const int count = static_cast<int>(shapes.size());
  Plan plan;
  plan.levels.resize(count);
  // Levels that reach the same occupancy share a launch. One that needs a whole SM a block would slow the others down.
  std::vector<int> left(count);
  for (int i = 0; i < count; ++i) {
    left[i] = i;
  }
  for (int blocks_per_sm : kBlocksPerSm) {
    std::vector<int> members, rest, spans(count);
    for (int i : left) {
      spans[i] = fewest_warps(shapes[i], itemsize, chip, blocks_per_sm);
      (spans[i] && members.size() < kMaxLevels ? members : rest).push_back(i);
    }
    left = rest;
    if (members.empty()) {
      continue;
    }
    LaunchPlan launch = assemble(shapes, itemsize, blocks_per_sm, members, spans, plan.levels);
    // A launch that leaves half the SMs idle gives every channel twice the warps.
    const int limit = launch.warps * chip.max_cluster;
    while (2 * launch.clusters * launch.cluster <= chip.sms &&
           std::all_of(members.begin(), members.end(), [&](int i) { return 2 * spans[i] <= limit; })) {
      for (int i : members) {
        spans[i] *= 2;
      }
      launch = assemble(shapes, itemsize, blocks_per_sm, members, spans, plan.levels);
    }
    for (int i : members) {
      plan.levels[i].launch = static_cast<int>(plan.launches.size());
    }
    plan.launches.push_back(std::move(launch));
  }
  return plan;
}

}  // namespace jdkd::pearson::single
