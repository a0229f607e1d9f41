// The planner of the single pass in Python, for its tests.
#include "common/bindings.h"
#include "ops/pearson_plan.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace jdkd::pearson::single {
namespace {

using Triple = std::tuple<int64_t, int64_t, int64_t>;

py::dict plan_as_dict(
    const std::vector<Triple>& levels, int itemsize, int sms, int64_t shared_per_block, int64_t shared_per_sm,
    int max_cluster) {
  std::vector<Shape> shapes;
  for (const auto& [n, c, hw] : levels) {
    shapes.push_back({n, c, hw});
  }
  const Plan plan = make_plan(shapes, itemsize, {sms, shared_per_block, shared_per_sm, max_cluster});
  py::list level_list, launch_list;
  for (const LevelPlan& level : plan.levels) {
    py::dict entry;
    entry["launch"] = level.launch < 0 ? py::object(py::none()) : py::object(py::int_(level.launch));
    entry["ranks"] = level.geometry.ranks;
    entry["teams"] = level.geometry.teams;
    entry["chunk"] = level.geometry.chunk;
    entry["room"] = level.geometry.room;
    entry["first_cluster"] = level.first_cluster;
    entry["clusters"] = level.clusters;
    level_list.append(entry);
  }
  for (const LaunchPlan& launch : plan.launches) {
    py::dict entry;
    entry["cluster"] = launch.cluster;
    entry["warps"] = launch.warps;
    entry["blocks_per_sm"] = launch.blocks_per_sm;
    entry["shared_bytes"] = launch.shared_bytes;
    entry["clusters"] = launch.clusters;
    entry["levels"] = launch.levels;
    launch_list.append(entry);
  }
  py::dict answer;
  answer["fits"] = plan.fits();
  answer["levels"] = level_list;
  answer["launches"] = launch_list;
  return answer;
}

template <int V>
py::list rows_of(const Geometry& g, int64_t cluster, int rank, int cluster_size, int team) {
  const Slice<V> slice(g, cluster, rank, cluster_size, team);
  py::list rows;
  for (int r = 0; r < slice.rows; ++r) {
    const Row row = slice.row(r);
    rows.append(py::make_tuple(
        slice.channel, row.start, row.length, row.phase, slice.offset(r), slice.vectors_of(row),
        slice.bulk_of(row, g.n * g.c * g.hw), slice.vectors));
  }
  return rows;
}

py::list plan_rows(
    Triple shape, const py::dict& level, int vector, int64_t cluster, int rank, int cluster_size, int team) {
  const auto [n, c, hw] = shape;
  const Geometry g{c,
                   static_cast<int>(n),
                   static_cast<int>(hw),
                   level["ranks"].cast<int>(),
                   level["teams"].cast<int>(),
                   level["chunk"].cast<int>(),
                   level["room"].cast<int>()};
  switch (vector) {
    case 8:
      return rows_of<8>(g, cluster, rank, cluster_size, team);
    case 4:
      return rows_of<4>(g, cluster, rank, cluster_size, team);
    default:
      return rows_of<1>(g, cluster, rank, cluster_size, team);
  }
}

}  // namespace
}  // namespace jdkd::pearson::single

JDKD_BINDINGS(pearson_plan) {
  using namespace jdkd::pearson::single;
  m.def(
      "pearson_plan", &plan_as_dict, py::arg("shapes"), py::arg("itemsize"), py::arg("sms"),
      py::arg("shared_per_block"), py::arg("shared_per_sm"), py::arg("max_cluster"),
      "How the single pass of the Pearson loss runs levels (N, C, H W): launches, and the share of a block.");
  m.def(
      "pearson_plan_rows", &plan_rows, py::arg("shape"), py::arg("level"), py::arg("vector"), py::arg("cluster"),
      py::arg("rank"), py::arg("cluster_size"), py::arg("team"),
      "What a team of a block holds of a level: (channel, start, length, phase, offset, vectors, bulk vectors, vectors "
      "of all rows) per row.");
}
