// The planner of the single pass as operators on integers; jdkd/ops/pearson_planner.py has names for them.
#include "common/checks.h"
#include "ops/pearson_plan.h"

#include <tuple>
#include <vector>

namespace jdkd::pearson::single {
namespace {

using Integers = std::vector<int64_t>;

std::tuple<Integers, Integers> pearson_plan(Integers shapes, int64_t itemsize, Integers chip) {
  check(
      shapes.size() % 3 == 0 && chip.size() == 4, "pearson_plan: ", shapes.size(), " integers of shapes and ",
      chip.size(), " of the chip were given; give three a level and four");
  std::vector<Shape> levels;
  for (size_t i = 0; i < shapes.size(); i += 3) {
    levels.push_back({shapes[i], shapes[i + 1], shapes[i + 2]});
  }
  const Plan plan = make_plan(
      levels, static_cast<int>(itemsize), {static_cast<int>(chip[0]), chip[1], chip[2], static_cast<int>(chip[3])});
  Integers of_levels, of_launches;
  for (const LevelPlan& level : plan.levels) {
    const Geometry& g = level.geometry;
    of_levels.insert(
        of_levels.end(), {level.launch, g.ranks(), g.teams(), g.chunk, g.room, level.first_cluster, level.clusters});
  }
  for (const LaunchPlan& launch : plan.launches) {
    of_launches.insert(
        of_launches.end(),
        {launch.cluster, launch.warps, launch.blocks_per_sm, launch.shared_bytes, launch.clusters});
  }
  return {of_levels, of_launches};
}

template <int V>
Integers rows_of(const Geometry& g, int64_t cluster, int rank, int cluster_size, int team) {
  const Slice<V> slice(g, cluster, rank, cluster_size, team);
  Integers rows;
  for (int r = 0; r < slice.rows; ++r) {
    const Row row = slice.row(r);
    rows.insert(
        rows.end(), {slice.channel, row.start, row.length, row.phase, slice.offset(r), slice.vectors_of(row),
                     slice.bulk_of(row, g.n * g.c * g.hw), slice.vectors});
  }
  return rows;
}

Integers pearson_plan_rows(Integers shape, Integers level, int64_t vector, Integers place) {
  check(
      shape.size() == 3 && level.size() == 4 && place.size() == 4, "pearson_plan_rows: ", shape.size(),
      " integers of the shape, ", level.size(), " of the level and ", place.size(),
      " of the place were given; give three, four and four");
  const auto integer = [](int64_t value) { return static_cast<int>(value); };
  Geometry g{shape[1], integer(shape[0]), integer(shape[2])};
  g.rank_bits = bits_of(level[0]), g.team_bits = bits_of(level[1]);
  g.chunk = integer(level[2]), g.room = integer(level[3]);
  const auto rows = vector == 8 ? rows_of<8> : vector == 4 ? rows_of<4> : rows_of<1>;
  return rows(g, place[0], integer(place[1]), integer(place[2]), integer(place[3]));
}

}  // namespace
}  // namespace jdkd::pearson::single

STABLE_TORCH_LIBRARY_FRAGMENT(jdkd_C, m) {
  // How the single pass runs levels. shapes: N, C, H W of each; chip: SMs, shared memory per block and per SM, blocks
  // of the largest cluster. Returns, level by level, the launch (-1: does not fit), ranks, teams, chunk, room, the
  // first cluster, clusters; and, launch by launch, cluster, warps, blocks per SM, shared bytes, clusters.
  m.def("pearson_plan(int[] shapes, int itemsize, int[] chip) -> (int[], int[])");
  // What a team of a block holds of a level, for tests. level: ranks, teams, chunk, room; place: cluster, rank, blocks
  // of a cluster, team. Returns, row by row, channel, start, length, phase, offset, vectors, bulk vectors, vectors of
  // all rows.
  m.def("pearson_plan_rows(int[] shape, int[] level, int vector, int[] place) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CompositeExplicitAutograd, m) {
  m.impl("pearson_plan", TORCH_BOX(&jdkd::pearson::single::pearson_plan));
  m.impl("pearson_plan_rows", TORCH_BOX(&jdkd::pearson::single::pearson_plan_rows));
}
