// Packing the active weights of a subnet, and the transpose: what every backend shares.
//
//   pack         packed[r, ky, kx, c] = weight[R(r), C(c), top + ky, left + kx], rounded once
//   unpack_add_  gradient[...] += packed gradient[...], the same elements, nothing else
//   unpack       the same into fresh zeros
//
// where R and C name active channels: the leading ones, or lists. jdkd/ops/pack_table.py makes the tables: merged
// dimensions, modes and pieces are explained there.
#pragma once

#include "common/checks.h"

#include <optional>
#include <vector>

namespace jdkd::pack {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Mode : int64_t { kCopy, kGather, kTurn };

enum class Action {
  kPack,  // shared weight -> packed weight
  kAdd,   // packed gradient is added to the shared one
  kSet,   // packed gradient replaces the shared one
};

constexpr int kTurnCells = 4608;  // floats of on-chip memory in which a piece is turned

// A row of the table, int64. Strides and offsets are in elements; packed memory is dense in the order of
// rows, taps_h, taps_w, columns.
struct Part {
  int64_t rows, columns, taps_h, taps_w;
  int64_t row_stride, column_stride, tap_h_stride, tap_w_stride, offset;  // of the shared weight
  int64_t row_list, column_list;                                          // where the lists begin, or -1
  int64_t mode, tile_rows, tile_columns;
  int64_t packed_offset, dense_offset;  // in flat buffers of all packed weights, of all dense gradients
};
constexpr int64_t kFields = 16;
static_assert(sizeof(Part) == kFields * sizeof(int64_t));

struct Piece {
  int32_t part, row, column, unused;
};

// The three tensors of a table, checked.
struct Table {
  const Part* parts;     // on the device of the weights
  const Piece* pieces;   // likewise; null where the caller cuts the parts itself
  const int64_t* index;  // all lists, likewise
  int64_t part_count, piece_count;

  Table(const char* op, const Tensor& parts, const std::optional<Tensor>& pieces, const Tensor& index);
};

// Checks that there is a tensor a part, all of one supported dtype, and returns that dtype.
ScalarType check_tensors(const char* op, const char* what, const std::vector<Tensor>& tensors, const Table& table);

// Checks the dtype and the layout of a flat buffer, and returns its dtype.
ScalarType check_flat(const char* op, const Tensor& flat);

}  // namespace jdkd::pack
