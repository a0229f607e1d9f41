// Pack and unpack on the CPU: one pass over the active elements, pieces dealt out to torch's threads.
//
// A piece is walked row by row. Where taps are innermost in the shared weight and columns in the packed one, a row is
// turned in a buffer that stays in the first cache; everything else is runs of columns.
#include "common/clones.h"
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
constexpr int64_t kPrefetch = 1024;     // bytes of the next run
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

JDKD_CLONES void add_floats(const float* __restrict__ from, int64_t n, float* __restrict__ to) {
  for (int64_t i = 0; i < n; ++i) {
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
  char* shared_run(int64_t row, int64_t t, int64_t column) const {
    return at(shared_row(row), tap(t) + column, shared_type);
  }
  char* packed_run(int64_t row, int64_t t, int64_t column) const {
    return at(packed, (row * taps() + t) * part->columns + column, packed_type);
  }
  bool has_runs() const { return part->column_list < 0 && part->column_stride == 1; }
  bool is_whole() const { return part->taps_h == 1 && part->tap_w_stride == 1 && part->column_stride == taps(); }
};

// Between run [n, taps] and cells [taps, n], of which the taps lie `pitch` apart; T is the number of taps where it is
// known, else 0. Blocks of eight columns keep what is written side by side. Turning eight by eight in registers gained
// 3 % in all.
template <Action action, int T>
JDKD_INLINE void turn(float* __restrict__ run, int64_t n, int64_t taps, float* __restrict__ cells, int64_t pitch) {
  constexpr int64_t kBlock = action == Action::kPack ? 8 : 1;
  const int64_t count = T ? T : taps;
  const auto block = [&](int64_t c, int64_t size) JDKD_INLINE_LAMBDA {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t k = 0; k < size; ++k) {
        float &shared = run[(c + k) * count + t], &cell = cells[t * pitch + c + k];
        if constexpr (action == Action::kPack) {
          cell = shared;
        } else {
          shared = action == Action::kAdd ? shared + cell : cell;
        }
      }
    }
  };
  int64_t c = 0;
  for (; c + kBlock <= n; c += kBlock) {
    block(c, kBlock);
  }
  for (; c < n; ++c) {
    block(c, 1);
  }
}

template <Action action>
JDKD_INLINE void turn_any(float* run, int64_t n, int64_t taps, float* cells, int64_t pitch) {
  taps == 9 ? turn<action, 9>(run, n, taps, cells, pitch) : turn<action, 0>(run, n, taps, cells, pitch);
}

JDKD_CLONES void turn_floats_in(float* run, int64_t n, int64_t taps, float* cells, int64_t pitch) {
  turn_any<Action::kPack>(run, n, taps, cells, pitch);
}

JDKD_CLONES void turn_floats_add(float* run, int64_t n, int64_t taps, float* cells, int64_t pitch) {
  turn_any<Action::kAdd>(run, n, taps, cells, pitch);
}

JDKD_CLONES void turn_floats_set(float* run, int64_t n, int64_t taps, float* cells, int64_t pitch) {
  turn_any<Action::kSet>(run, n, taps, cells, pitch);
}

// Columns first..first + n of a row, element by element, between the shared side and cells [taps, n], those of a tap
// `pitch` apart.
template <Action action, class T>
void gather_row(const Job& job, T* shared, int64_t first, int64_t n, float* cells, int64_t pitch) {
  const int64_t stride = job.part->column_stride;
  const int64_t* list = job.part->column_list < 0 ? nullptr : job.index + job.part->column_list + first;
  for (int64_t t = 0; t < job.taps(); ++t) {
    T* from = shared + job.tap(t);
    float* cell = cells + t * pitch;
    for (int64_t c = 0; c < n; ++c) {
      T& value = from[(list ? list[c] : first + c) * stride];
      if constexpr (action == Action::kPack) {
        cell[c] = static_cast<float>(value);
      } else {
        value = static_cast<T>(action == Action::kAdd ? static_cast<float>(value) + cell[c] : cell[c]);
      }
    }
  }
}

// The same, by the fastest way there is.
template <Action action>
void turn_row(const Job& job, int64_t row, int64_t first, int64_t n, float* cells, int64_t pitch) {
  char* shared = job.shared_row(row);
  if (job.shared_type == ScalarType::BFloat16) {
    gather_row<action>(job, reinterpret_cast<c10::BFloat16*>(shared), first, n, cells, pitch);
  } else if (job.shared_type == ScalarType::Half) {
    gather_row<action>(job, reinterpret_cast<c10::Half*>(shared), first, n, cells, pitch);
  } else if (!job.is_whole() || job.part->column_list >= 0) {
    gather_row<action>(job, reinterpret_cast<float*>(shared), first, n, cells, pitch);
  } else {
    float* run = reinterpret_cast<float*>(shared) + first * job.part->column_stride;
    if constexpr (action == Action::kPack) {
      turn_floats_in(run, n, job.taps(), cells, pitch);
    } else if constexpr (action == Action::kAdd) {
      turn_floats_add(run, n, job.taps(), cells, pitch);
    } else {
      turn_floats_set(run, n, job.taps(), cells, pitch);
    }
  }
}

// Runs of the shared side lie apart, so that the processor does not see the next one coming.
void prefetch(const char* run, int64_t bytes) {
  for (int64_t i = 0; i < std::min(bytes, kPrefetch); i += 64) {
    __builtin_prefetch(run + i);
  }
}

// Columns first..first + n of a row that lie side by side on both sides.
template <Action action>
void move_runs(const Job& job, int64_t row, int64_t first, int64_t n) {
  const int64_t taps = job.taps(), bytes = n * itemsize(job.shared_type);
  for (int64_t t = 0; t < taps; ++t) {
    char *shared = job.shared_run(row, t, first), *packed = job.packed_run(row, t, first);
    if (t + 1 < taps || row + 1 < job.part->rows) {
      prefetch(t + 1 < taps ? job.shared_run(row, t + 1, first) : job.shared_run(row + 1, 0, first), bytes);
    }
    if constexpr (action == Action::kPack) {
      convert_run({shared, job.shared_type}, n, packed, job.packed_type);
    } else if constexpr (action == Action::kAdd) {
      add_run({packed, job.packed_type}, n, shared, job.shared_type);
    } else {
      convert_run({packed, job.packed_type}, n, shared, job.shared_type);
    }
  }
}

// Columns first..first + n of a row that are turned: in `cells`, or, float32, straight from one side to the other.
template <Action action>
void move_turned(const Job& job, int64_t row, int64_t first, int64_t n, std::vector<float>& cells) {
  if (row + 1 < job.part->rows && job.is_whole()) {
    prefetch(job.shared_run(row + 1, 0, first * job.part->column_stride), kPrefetch);
  }
  if (job.packed_type == ScalarType::Float) {
    float* packed = reinterpret_cast<float*>(job.packed_run(row, 0, first));
    turn_row<action>(job, row, first, n, packed, job.part->columns);
    return;
  }
  const int64_t taps = job.taps();
  cells.resize(std::max<size_t>(cells.size(), taps * n));
  if constexpr (action == Action::kPack) {
    turn_row<action>(job, row, first, n, cells.data(), n);
    for (int64_t t = 0; t < taps; ++t) {
      round_floats(cells.data() + t * n, n, job.packed_run(row, t, first), job.packed_type);
    }
  } else {
    for (int64_t t = 0; t < taps; ++t) {
      copy_floats({job.packed_run(row, t, first), job.packed_type}, n, cells.data() + t * n);
    }
    turn_row<action>(job, row, first, n, cells.data(), n);
  }
}

std::vector<Piece> cut(const std::vector<Job>& jobs) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const Part& part = *jobs[i].part;
    for (int64_t row = 0; row < part.rows; row += part.tile_rows) {
      for (int64_t column = 0; column < part.columns; column += part.tile_columns) {
        pieces.push_back({static_cast<int32_t>(i), static_cast<int32_t>(row), static_cast<int32_t>(column), 0});
      }
    }
  }
  return pieces;
}

template <Action action>
void work_pieces(const std::vector<Job>& jobs) {
  const std::vector<Piece> pieces = cut(jobs);
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> cells;
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      const Job& job = jobs[piece.part];
      const Part& part = *job.part;
      const int64_t last = std::min(part.rows, piece.row + part.tile_rows);
      const int64_t n = std::min(part.tile_columns, part.columns - piece.column);
      for (int64_t row = piece.row; row < last; ++row) {
        if (job.has_runs()) {
          move_runs<action>(job, row, piece.column, n);
        } else {
          move_turned<action>(job, row, piece.column, n, cells);
        }
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

void pack(std::vector<Tensor> weights, Tensor parts, std::optional<Tensor>, Tensor index, Tensor flat) {
  const Table table("pack", parts, std::nullopt, index);
  const ScalarType type = pack::check_tensors("pack", "weights", weights, table), to = pack::check_flat("pack", flat);
  std::vector<Job> jobs;
  for (int64_t i = 0; i < table.part_count; ++i) {
    jobs.push_back(job_of(table, i, data(weights[i]), type, at(data(flat), table.parts[i].packed_offset, to), to));
  }
  work_pieces<Action::kPack>(jobs);
}

void unpack_add_(
    std::vector<Tensor> gradients, Tensor parts, std::optional<Tensor>, Tensor index, std::vector<Tensor> packed) {
  const Table table("unpack_add_", parts, std::nullopt, index);
  const ScalarType type = pack::check_tensors("unpack_add_", "gradients", gradients, table);
  const ScalarType from = pack::check_tensors("unpack_add_", "packed gradients", packed, table);
  std::vector<Job> jobs;
  for (int64_t i = 0; i < table.part_count; ++i) {
    jobs.push_back(job_of(table, i, data(gradients[i]), type, data(packed[i]), from));
  }
  work_pieces<Action::kAdd>(jobs);
}

void unpack(std::vector<Tensor> packed, Tensor parts, std::optional<Tensor>, Tensor index, Tensor flat) {
  const Table table("unpack", parts, std::nullopt, index);
  const ScalarType from = pack::check_tensors("unpack", "packed gradients", packed, table);
  const ScalarType type = pack::check_flat("unpack", flat);
  std::vector<Job> jobs;
  for (int64_t i = 0; i < table.part_count; ++i) {
    char* dense = at(data(flat), table.parts[i].dense_offset, type);
    jobs.push_back(job_of(table, i, dense, type, data(packed[i]), from));
  }
  work_pieces<Action::kSet>(jobs);
}

}  // namespace
}  // namespace jdkd::cpu

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CPU, m) {
  m.impl("pack", TORCH_BOX(&jdkd::cpu::pack));
  m.impl("unpack_add_", TORCH_BOX(&jdkd::cpu::unpack_add_));
  m.impl("unpack", TORCH_BOX(&jdkd::cpu::unpack));
}
