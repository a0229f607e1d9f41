// Pack and unpack on the CPU: one pass over the active elements, pieces dealt out to torch's threads.
//
// A piece is walked row by row. Where taps are innermost in the shared weight and columns in the packed one, a row is
// turned in a buffer that stays in the first cache; everything else is runs of columns.
#include "common/memory.h"
#include "common/vec.h"
#include "cpu/convert.h"
#include "ops/pack.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

namespace jdkd::cpu {
namespace {

using pack::Action;
using pack::Part;
using pack::Piece;
using pack::Table;
using torch::stable::Tensor;

constexpr int64_t kRun = 2048;          // elements converted at a time
constexpr int64_t kGrain = 4;           // pieces a task at least

int64_t itemsize(ScalarType type) { return type == ScalarType::Float ? 4 : 2; }

char* at(char* base, int64_t elements, ScalarType type) { return base + elements * itemsize(type); }

// ---- runs: n elements side by side on both sides ----

void convert_run(Cursor from, int64_t n, char* to, ScalarType type) {
  if (from.type == type) {
    std::memcpy(to, from.at, n * from.itemsize());
  } else if (type == ScalarType::Float) {
    copy_floats(from, n, reinterpret_cast<float*>(to));
  } else {
    alignas(64) float buffer[kRun];
    for (int64_t i = 0; i < n; i += kRun) {
      const int64_t some = std::min(kRun, n - i);
      round_floats(as_floats(from + i, some, buffer), some, at(to, i, type), type);
    }
  }
}

JDKD_CLONES void add_floats(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(to + i, load(to + i) + load(from + i));
  }
  for (; i < n; ++i) {
    to[i] += from[i];
  }
}

void add_run(Cursor from, int64_t n, char* to, ScalarType type) {
  alignas(64) float added[kRun], sums[kRun];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t some = std::min(kRun, n - i);
    const float* values = as_floats(from + i, some, added);
    if (type == ScalarType::Float) {
      add_floats(values, some, reinterpret_cast<float*>(to) + i);
    } else {
      copy_floats({at(to, i, type), type}, some, sums);
      add_floats(values, some, sums);
      round_floats(sums, some, at(to, i, type), type);
    }
  }
}

// ---- single elements of the shared side ----

float get(const char* base, int64_t i, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return reinterpret_cast<const float*>(base)[i];
    case ScalarType::BFloat16:
      return reinterpret_cast<const c10::BFloat16*>(base)[i];
    default:
      return reinterpret_cast<const c10::Half*>(base)[i];
  }
}

void put(char* base, int64_t i, ScalarType type, float value) {
  switch (type) {
    case ScalarType::Float:
      reinterpret_cast<float*>(base)[i] = value;
      return;
    case ScalarType::BFloat16:
      reinterpret_cast<c10::BFloat16*>(base)[i] = value;
      return;
    default:
      reinterpret_cast<c10::Half*>(base)[i] = value;
  }
}

// ---- a part ----

// One part and the memory of both sides; taps are walked in the order of packed memory.
struct Job {
  const Part* part;
  const int64_t* index;
  char* shared;  // at the part's offset
  ScalarType shared_type;
  char* packed;
  ScalarType packed_type;

  int64_t taps() const { return part->taps_h * part->taps_w; }
  int64_t tap(int64_t t) const {
    return t / part->taps_w * part->tap_h_stride + t % part->taps_w * part->tap_w_stride;
  }
  char* shared_row(int64_t row) const {
    const int64_t listed = part->row_list < 0 ? row : index[part->row_list + row];
    return at(shared, listed * part->row_stride, shared_type);
  }
  char* packed_run(int64_t row, int64_t t, int64_t column) const {
    return at(packed, (row * taps() + t) * part->columns + column, packed_type);
  }
  bool has_runs() const { return part->column_list < 0 && part->column_stride == 1; }
  bool is_whole() const { return part->taps_h == 1 && part->tap_w_stride == 1 && part->column_stride == taps(); }
};

// cells[t][c] = run[c][t] for T taps; and back.
template <int T>
JDKD_INLINE void turn_in(const float* run, int64_t columns, int64_t taps, float* cells) {
  const int64_t count = T ? T : taps;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t t = 0; t < count; ++t) {
      cells[t * columns + c] = run[c * count + t];
    }
  }
}

template <int T, Action action>
JDKD_INLINE void turn_out(const float* cells, int64_t columns, int64_t taps, float* run) {
  const int64_t count = T ? T : taps;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t t = 0; t < count; ++t) {
      const float value = cells[t * columns + c];
      run[c * count + t] = action == Action::kAdd ? run[c * count + t] + value : value;
    }
  }
}

JDKD_CLONES void turn_floats_in(const float* run, int64_t columns, int64_t taps, float* cells) {
  taps == 9 ? turn_in<9>(run, columns, taps, cells) : turn_in<0>(run, columns, taps, cells);
}

template <Action action>
JDKD_INLINE void turn_floats_out(const float* cells, int64_t columns, int64_t taps, float* run) {
  taps == 9 ? turn_out<9, action>(cells, columns, taps, run) : turn_out<0, action>(cells, columns, taps, run);
}

JDKD_CLONES void turn_floats_add(const float* cells, int64_t columns, int64_t taps, float* run) {
  turn_floats_out<Action::kAdd>(cells, columns, taps, run);
}

JDKD_CLONES void turn_floats_set(const float* cells, int64_t columns, int64_t taps, float* run) {
  turn_floats_out<Action::kSet>(cells, columns, taps, run);
}

// Columns first..first + n of a row, between the shared side and cells [taps, n].
template <Action action>
void turn_row(const Job& job, int64_t row, int64_t first, int64_t n, float* cells) {
  const Part& part = *job.part;
  char* shared = job.shared_row(row);
  if (job.is_whole() && part.column_list < 0 && job.shared_type == ScalarType::Float) {
    float* run = reinterpret_cast<float*>(shared) + first * part.column_stride;
    if constexpr (action == Action::kPack) {
      turn_floats_in(run, n, job.taps(), cells);
    } else if constexpr (action == Action::kAdd) {
      turn_floats_add(cells, n, job.taps(), run);
    } else {
      turn_floats_set(cells, n, job.taps(), run);
    }
    return;
  }
  for (int64_t c = 0; c < n; ++c) {
    const int64_t column = part.column_list < 0 ? first + c : job.index[part.column_list + first + c];
    for (int64_t t = 0; t < job.taps(); ++t) {
      const int64_t place = column * part.column_stride + job.tap(t);
      float& cell = cells[t * n + c];
      if constexpr (action == Action::kPack) {
        cell = get(shared, place, job.shared_type);
      } else {
        put(shared, place, job.shared_type, action == Action::kAdd ? get(shared, place, job.shared_type) + cell : cell);
      }
    }
  }
}

// Columns first..first + n of a row of a part, through `cells` where they are turned.
template <Action action>
void work_row(const Job& job, int64_t row, int64_t first, int64_t n, std::vector<float>& cells) {
  const int64_t taps = job.taps();
  if (job.has_runs()) {
    for (int64_t t = 0; t < taps; ++t) {
      char* shared = at(job.shared_row(row), job.tap(t) + first, job.shared_type);
      char* packed = job.packed_run(row, t, first);
      if constexpr (action == Action::kPack) {
        convert_run({shared, job.shared_type}, n, packed, job.packed_type);
      } else if constexpr (action == Action::kAdd) {
        add_run({packed, job.packed_type}, n, shared, job.shared_type);
      } else {
        convert_run({packed, job.packed_type}, n, shared, job.shared_type);
      }
    }
    return;
  }
  cells.resize(std::max<size_t>(cells.size(), taps * n));
  if constexpr (action == Action::kPack) {
    turn_row<action>(job, row, first, n, cells.data());
  }
  for (int64_t t = 0; t < taps; ++t) {
    float* run = cells.data() + t * n;
    char* packed = job.packed_run(row, t, first);
    if constexpr (action == Action::kPack) {
      convert_run({run, ScalarType::Float}, n, packed, job.packed_type);
    } else {
      copy_floats({packed, job.packed_type}, n, run);
    }
  }
  if constexpr (action != Action::kPack) {
    turn_row<action>(job, row, first, n, cells.data());
  }
}

template <Action action>
void work_pieces(const Table& table, const std::vector<Job>& jobs) {
  torch::stable::parallel_for(0, table.piece_count, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> cells;
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = table.pieces[i];
      const Part& part = table.parts[piece.part];
      const int64_t last = std::min(part.rows, piece.row + part.tile_rows);
      const int64_t n = std::min(part.tile_columns, part.columns - piece.column);
      for (int64_t row = piece.row; row < last; ++row) {
        work_row<action>(jobs[piece.part], row, piece.column, n, cells);
      }
    }
  });
}

// ---- operators ----

Job job_of(const Table& table, int64_t i, char* shared, ScalarType shared_type, char* packed, ScalarType packed_type) {
  const Part& part = table.parts[i];
  return {&part, table.index, at(shared, part.offset, shared_type), shared_type, packed, packed_type};
}

char* data(const Tensor& tensor) { return static_cast<char*>(tensor.data_ptr()); }

void pack(std::vector<Tensor> weights, Tensor parts, Tensor pieces, Tensor index, Tensor flat) {
  const Table table("pack", parts, pieces, index);
  const ScalarType type = pack::check_tensors("pack", "weights", weights, table), to = pack::check_flat("pack", flat);
  ask_for_huge_pages(data(flat), flat.numel() * flat.element_size());
  std::vector<Job> jobs;
  for (int64_t i = 0; i < table.part_count; ++i) {
    jobs.push_back(job_of(table, i, data(weights[i]), type, at(data(flat), table.parts[i].packed_offset, to), to));
  }
  work_pieces<Action::kPack>(table, jobs);
}

void unpack_add_(
    std::vector<Tensor> gradients, Tensor parts, Tensor pieces, Tensor index, std::vector<Tensor> packed) {
  const Table table("unpack_add_", parts, pieces, index);
  const ScalarType type = pack::check_tensors("unpack_add_", "gradients", gradients, table);
  const ScalarType from = pack::check_tensors("unpack_add_", "packed gradients", packed, table);
  std::vector<Job> jobs;
  for (int64_t i = 0; i < table.part_count; ++i) {
    jobs.push_back(job_of(table, i, data(gradients[i]), type, data(packed[i]), from));
  }
  work_pieces<Action::kAdd>(table, jobs);
}

void unpack(std::vector<Tensor> packed, Tensor parts, Tensor pieces, Tensor index, Tensor flat) {
  const Table table("unpack", parts, pieces, index);
  const ScalarType from = pack::check_tensors("unpack", "packed gradients", packed, table);
  const ScalarType type = pack::check_flat("unpack", flat);
  std::vector<Job> jobs;
  for (int64_t i = 0; i < table.part_count; ++i) {
    char* dense = at(data(flat), table.parts[i].dense_offset, type);
    jobs.push_back(job_of(table, i, dense, type, data(packed[i]), from));
  }
  work_pieces<Action::kSet>(table, jobs);
}

}  // namespace
}  // namespace jdkd::cpu

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CPU, m) {
  m.impl("pack", TORCH_BOX(&jdkd::cpu::pack));
  m.impl("unpack_add_", TORCH_BOX(&jdkd::cpu::unpack_add_));
  m.impl("unpack", TORCH_BOX(&jdkd::cpu::unpack));
}
