// Pack and unpack on CUDA: one launch for all parts of a subnet, a block a piece.
//
// Grid: one block of 256 threads a piece of about 4096 elements (jdkd/ops/pack_table.py), in the order of the parts.
// Reads / Writes: each active element once on either side; adding reads the shared side too. A list costs 8 bytes a
//   row or column of a piece, mostly from a cache. Pointers travel by value, kMaxParts a launch.
// Numerics: float32 in registers, rounded once to nearest; between equal dtypes a copy of the value.
// Deterministic: yes, one thread owns an element. Limits: 64-bit offsets; the gradients of one launch are distinct.
#include "common/cuda.h"
#include "common/element_type.cuh"
#include "common/vec.cuh"
#include "ops/pack.h"

#include <algorithm>

namespace jdkd::pack {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 4096;    // elements of a piece, about
constexpr int kMaxParts = 480;  // pointers of both sides: 7.5 KB of the 32 KB that arguments may take

// Where the parts of a launch lie; the flat buffer of a side repeated, where there is one.
struct Pointers {
  void* shared[kMaxParts];
  void* packed[kMaxParts];
  int first, count;
};

template <class T>
__device__ __forceinline__ T from_float(float x) {
  T rounded;
  assign(rounded, x);
  return rounded;
}

// What the shared side becomes.
template <Action action, class S>
__device__ __forceinline__ S unpacked(S shared, float packed) {
  return from_float<S>(action == Action::kAdd ? as_float(shared) + packed : packed);
}

// V elements side by side, moved by 16 bytes at a time where there are so many.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vector {
  T at[V];
};

// A vector's worth of the action, between two places that both hold V elements side by side.
template <Action action, int V, class S, class P>
struct Transfer {
  Vector<S, V> own;
  Vector<P, V> theirs;

  __device__ __forceinline__ void load(const S* shared, const P* packed) {
    if constexpr (action != Action::kSet) {
      own = *reinterpret_cast<const Vector<S, V>*>(shared);
    }
    if constexpr (action != Action::kPack) {
      theirs = *reinterpret_cast<const Vector<P, V>*>(packed);
    }
  }
  __device__ __forceinline__ void store(S* shared, P* packed) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if constexpr (action == Action::kPack) {
        theirs.at[i] = from_float<P>(as_float(own.at[i]));
      } else {
        own.at[i] = unpacked<action>(own.at[i], as_float(theirs.at[i]));
      }
    }
    if constexpr (action == Action::kPack) {
      *reinterpret_cast<Vector<P, V>*>(packed) = theirs;
    } else {
      *reinterpret_cast<Vector<S, V>*>(shared) = own;
    }
  }
};

// Element i = thread, thread + kThreads and so on of [outer, middle, inner], without a division each.
struct Walk {
  const int middles, inners;
  int outer, middle, inner, outer_step, middle_step, inner_step;

  __device__ __forceinline__ Walk(int middles, int inners) : middles(middles), inners(inners) {
    const int at = static_cast<int>(threadIdx.x) / inners, step = kThreads / inners;
    inner = threadIdx.x - at * inners, inner_step = kThreads - step * inners;
    outer = at / middles, outer_step = step / middles;
    middle = at - outer * middles, middle_step = step - outer_step * middles;
  }
  __device__ __forceinline__ void advance() {
    inner += inner_step;
    const bool next_middle = inner >= inners;
    inner -= next_middle ? inners : 0;
    middle += middle_step + next_middle;
    const bool next_outer = middle >= middles;
    middle -= next_outer ? middles : 0;
    outer += outer_step + next_outer;
  }
};

// All transfers [outers, middles, inners] of a block; place(outer, middle, inner, own, theirs) says where, as offsets.
// A thread asks for kBatch before it uses the first; where it has fewer, for one again, so that no branch parts loads.
template <Action action, int V, int kBatch, class S, class P, class Place>
__device__ __forceinline__ void transfer_all(
    S* shared, P* packed, int outers, int middles, int inners, const Place& place) {
  Walk walk(middles, inners);
  const int total = outers * middles * inners;
  for (int left = (total - static_cast<int>(threadIdx.x) + kThreads - 1) / kThreads; left > 0; left -= kBatch) {
    Transfer<action, V, S, P> transfers[kBatch];
    int64_t own[kBatch], theirs[kBatch];
    const int outer = walk.outer, middle = walk.middle, inner = walk.inner;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const bool is_own = k < left;
      place(
          is_own ? walk.outer : outer, is_own ? walk.middle : middle, is_own ? walk.inner : inner, own[k],
          theirs[k]);
      walk.advance();
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      transfers[k].load(shared + own[k], packed + theirs[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (k < left) {
        transfers[k].store(shared + own[k], packed + theirs[k]);
      }
    }
  }
}

// What a block works on: `rows` by `taps` by `columns` elements of a part.
template <class S, class P>
struct Work {
  const Part part;
  S* shared;             // at the part's offset
  P* packed;             // at its first element
  const int64_t* index;  // all lists
  int first_row, first_column, rows, taps, columns;

  // Offsets on the shared side;
  __device__ __forceinline__ int64_t row(int r) const {
    const int64_t row = first_row + r;
    return (part.row_list < 0 ? row : index[part.row_list + row]) * part.row_stride;
  }
  __device__ __forceinline__ int64_t tap(int t) const {
    const int width = static_cast<int>(part.taps_w);
    return width == taps ? t * part.tap_w_stride : t / width * part.tap_h_stride + t % width * part.tap_w_stride;
  }
  __device__ __forceinline__ int64_t column(int c) const {
    const int64_t column = first_column + c;
    return (part.column_list < 0 ? column : index[part.column_list + column]) * part.column_stride;
  }
  // and on the packed one.
  __device__ __forceinline__ int64_t run(int r, int t) const {
    return ((first_row + r) * static_cast<int64_t>(taps) + t) * part.columns + first_column;
  }
};

// Runs of columns on both sides, V at a time; a thread has its vectors of a piece of 4096 elements in flight at once,
// or two where both sides are read, which else takes too many registers.
template <Action action, int V, class S, class P>
__device__ __forceinline__ void copy_piece(const Work<S, P>& work) {
  constexpr int kBatch = action == Action::kAdd ? 2 : kPiece / (V * kThreads);
  transfer_all<action, V, kBatch, S, P>(
      work.shared, work.packed, work.rows, work.taps, work.columns / V,
      [&](int r, int t, int c, int64_t& own, int64_t& theirs) {
        own = work.row(r) + work.tap(t) + work.first_column + c * V;
        theirs = work.run(r, t) + c * V;
      });
}

// Element by element, in packed order.
template <Action action, class S, class P>
__device__ __forceinline__ void gather_piece(const Work<S, P>& work) {
  transfer_all<action, 1, 4, S, P>(
      work.shared, work.packed, work.rows, work.taps, work.columns,
      [&](int r, int t, int c, int64_t& own, int64_t& theirs) {
        own = work.row(r) + work.tap(t) + work.column(c);
        theirs = work.run(r, t) + c;
      });
}

// The side of a turn that lies in shared-weight order, taps innermost: between it and the cells [rows, taps, pitch].
template <Action action, class S, class P>
__device__ __forceinline__ void turn_shared_side(const Work<S, P>& work, float* cells, int pitch) {
  const int taps = work.taps, per_row = work.columns * taps;
  const int64_t first = static_cast<int64_t>(work.first_column) * taps;
  const bool flat = work.part.column_list < 0 && work.part.column_stride == taps && work.part.tap_w_stride == 1 &&
      work.part.taps_w == taps && work.part.row_stride % 4 == 0 && first % 4 == 0 && per_row % 4 == 0 &&
      is_pack_aligned(work.shared);
  const int total = work.rows * per_row;
  if (!flat) {
    transfer_all<action, 1, 4, S, float>(
        work.shared, cells, work.rows, work.columns, taps, [&](int r, int c, int t, int64_t& own, int64_t& cell) {
          own = work.row(r) + work.tap(t) + work.column(c);
          cell = (r * taps + t) * pitch + c;
        });
    return;
  }
  constexpr int kBatch = 2, kStep = 4 * kThreads;
  for (int i = threadIdx.x * 4; i < total; i += kBatch * kStep) {
    Vector<S, 4> values[kBatch];
    if constexpr (action != Action::kSet) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int place = min(i + k * kStep, total - 4), r = place / per_row;
        values[k] = *reinterpret_cast<const Vector<S, 4>*>(work.shared + work.row(r) + first + (place - r * per_row));
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int place = i + k * kStep, r = place / per_row, at = place - r * per_row;
      if (place < total) {
        int c = at / taps, t = at - c * taps;
        float* row = cells + r * taps * pitch;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float* cell = row + t * pitch + c;
          if constexpr (action == Action::kPack) {
            *cell = as_float(values[k].at[e]);
          } else {
            values[k].at[e] = unpacked<action>(values[k].at[e], *cell);
          }
          ++t;
          c += t == taps;
          t = t == taps ? 0 : t;
        }
        if constexpr (action != Action::kPack) {
          *reinterpret_cast<Vector<S, 4>*>(work.shared + work.row(r) + first + at) = values[k];
        }
      }
    }
  }
}

// The side of a turn that lies in packed order: between the cells and the packed side, V columns at a time.
template <Action action, int V, class S, class P>
__device__ __forceinline__ void turn_packed_side(const Work<S, P>& work, float* cells, int pitch) {
  // Cells take the place of the shared side: packing reads them, unpacking fills them.
  constexpr Action kDone = action == Action::kPack ? Action::kPack : Action::kSet;
  transfer_all<kDone, V, V == 1 ? 4 : kPiece / (V * kThreads), float, P>(
      cells, work.packed, work.rows, work.taps, work.columns / V,
      [&](int r, int t, int c, int64_t& cell, int64_t& theirs) {
        cell = (r * work.taps + t) * pitch + c * V;
        theirs = work.run(r, t) + c * V;
      });
}

template <Action action, class S, class P>
__global__ void __launch_bounds__(kThreads) pack_kernel(
    const __grid_constant__ Pointers pointers, const Part* __restrict__ parts, const Piece* __restrict__ pieces,
    const int64_t* __restrict__ index) {
  constexpr int V = sizeof(S) == 4 && sizeof(P) == 4 ? 4 : 8;
  alignas(16) __shared__ float cells[kTurnCells];
  const Piece piece = pieces[blockIdx.x];
  const int place = piece.part - pointers.first;
  if (place < 0 || place >= pointers.count) {
    return;  // of another launch
  }
  const Part part = parts[piece.part];
  const Work<S, P> work{
      part,
      static_cast<S*>(pointers.shared[place]) + (action == Action::kSet ? part.dense_offset : 0) + part.offset,
      static_cast<P*>(pointers.packed[place]) + (action == Action::kPack ? part.packed_offset : 0),
      index,
      piece.row,
      piece.column,
      static_cast<int>(min(part.tile_rows, part.rows - piece.row)),
      static_cast<int>(part.taps_h * part.taps_w),
      static_cast<int>(min(part.tile_columns, part.columns - piece.column))};
  const bool packed_wide = is_pack_aligned(work.packed) && part.columns % V == 0;  // pieces begin at multiples of V
  if (part.mode == kTurn) {
    const int pitch = (work.columns + 3) / 4 * 4 + 4;
    if constexpr (action == Action::kPack) {
      turn_shared_side<action>(work, cells, pitch);
      __syncthreads();
    }
    if (packed_wide) {
      turn_packed_side<action, V>(work, cells, pitch);
    } else {
      turn_packed_side<action, 1>(work, cells, pitch);
    }
    if constexpr (action != Action::kPack) {
      __syncthreads();
      turn_shared_side<action>(work, cells, pitch);
    }
  } else if (part.mode == kCopy && packed_wide && is_pack_aligned(work.shared)) {
    copy_piece<action, V>(work);
  } else {
    gather_piece<action>(work);
  }
}

// The addresses of parts i: of a tensor each, or of the flat buffer that holds all.
struct Side {
  std::vector<void*> own;
  void* flat = nullptr;

  explicit Side(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) {
      own.push_back(tensor.data_ptr());
    }
  }
  explicit Side(const Tensor& buffer) : flat(buffer.data_ptr()) {}
  void* at(int64_t i) const { return flat ? flat : own[i]; }
};

template <Action action>
void launch(
    const Tensor& like, const Table& table, ScalarType shared_type, ScalarType packed_type, const Side& shared,
    const Side& packed) {
  check(table.pieces != nullptr, "pack: pieces are missing");
  const cudaStream_t stream = current_stream(like);
  for (int64_t first = 0; first < table.part_count; first += kMaxParts) {
    Pointers pointers;
    pointers.first = static_cast<int>(first);
    pointers.count = static_cast<int>(std::min<int64_t>(kMaxParts, table.part_count - first));
    for (int i = 0; i < pointers.count; ++i) {
      pointers.shared[i] = shared.at(first + i);
      pointers.packed[i] = packed.at(first + i);
    }
    dispatch(shared_type, [&](auto s) {
      dispatch(packed_type, [&](auto p) {
        launch_kernel(
            "pack", pack_kernel<action, decltype(s), decltype(p)>, table.piece_count, kThreads, stream, pointers,
            table.parts, table.pieces, table.index);
      });
    });
  }
}

void pack(std::vector<Tensor> weights, Tensor parts, std::optional<Tensor> pieces, Tensor index, Tensor flat) {
  const Table table("pack", parts, pieces, index);
  const ScalarType type = check_tensors("pack", "weights", weights, table), packed_type = check_flat("pack", flat);
  const torch::stable::accelerator::DeviceGuard guard(flat.get_device_index());
  launch<Action::kPack>(flat, table, type, packed_type, Side(weights), Side(flat));
}

void unpack_add_(
    std::vector<Tensor> gradients, Tensor parts, std::optional<Tensor> pieces, Tensor index, std::vector<Tensor> packed) {
  const Table table("unpack_add_", parts, pieces, index);
  const ScalarType type = check_tensors("unpack_add_", "gradients", gradients, table);
  const ScalarType packed_type = check_tensors("unpack_add_", "packed gradients", packed, table);
  const torch::stable::accelerator::DeviceGuard guard(gradients[0].get_device_index());
  launch<Action::kAdd>(gradients[0], table, type, packed_type, Side(gradients), Side(packed));
}

void unpack(std::vector<Tensor> packed, Tensor parts, std::optional<Tensor> pieces, Tensor index, Tensor flat) {
  const Table table("unpack", parts, pieces, index);
  const ScalarType packed_type = check_tensors("unpack", "packed gradients", packed, table);
  const ScalarType type = check_flat("unpack", flat);
  const torch::stable::accelerator::DeviceGuard guard(flat.get_device_index());
  launch<Action::kSet>(flat, table, type, packed_type, Side(flat), Side(packed));
}

}  // namespace
}  // namespace jdkd::pack

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CUDA, m) {
  m.impl("pack", TORCH_BOX(&jdkd::pack::pack));
  m.impl("unpack_add_", TORCH_BOX(&jdkd::pack::unpack_add_));
  m.impl("unpack", TORCH_BOX(&jdkd::pack::unpack));
}
