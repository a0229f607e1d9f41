#include "ops/pack.h"

namespace jdkd::pack {

namespace {

bool is_supported(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

}  // namespace

Table::Table(
    const char* op, const Tensor& parts_tensor, const std::optional<Tensor>& pieces_tensor, const Tensor& index_tensor)
    : pieces(nullptr), piece_count(0) {
  check(
      parts_tensor.dim() == 2 && parts_tensor.size(1) == kFields && parts_tensor.is_contiguous() &&
          parts_tensor.scalar_type() == ScalarType::Long,
      op, ": parts has shape ", shape_text(parts_tensor), "; it must be a contiguous int64 [P, ", kFields, "]");
  if (pieces_tensor) {
    check(
        pieces_tensor->dim() == 2 && pieces_tensor->size(1) == 4 && pieces_tensor->is_contiguous() &&
            pieces_tensor->scalar_type() == ScalarType::Int,
        op, ": pieces has shape ", shape_text(*pieces_tensor), "; it must be a contiguous int32 [pieces, 4]");
    pieces = static_cast<const Piece*>(pieces_tensor->const_data_ptr());
    piece_count = pieces_tensor->size(0);
  }
  check(
      index_tensor.dim() == 1 && index_tensor.is_contiguous() && index_tensor.scalar_type() == ScalarType::Long, op,
      ": index has shape ", shape_text(index_tensor), "; it must be a contiguous int64 vector");
  parts = static_cast<const Part*>(parts_tensor.const_data_ptr());
  index = static_cast<const int64_t*>(index_tensor.const_data_ptr());
  part_count = parts_tensor.size(0);
}

ScalarType check_tensors(const char* op, const char* what, const std::vector<Tensor>& tensors, const Table& table) {
  check(
      static_cast<int64_t>(tensors.size()) == table.part_count && !tensors.empty(), op, ": ", tensors.size(), " ", what,
      " were given for ", table.part_count, " parts; give one a part, at least one");
  const ScalarType type = tensors[0].scalar_type();
  check(is_supported(type), op, ": ", what, " must be of float32, bfloat16 or float16");
  for (const Tensor& tensor : tensors) {
    check(tensor.scalar_type() == type, op, ": ", what, " are of different dtypes; give one dtype");
  }
  return type;
}

ScalarType check_flat(const char* op, const Tensor& flat) {
  check(
      flat.dim() == 1 && flat.is_contiguous() && is_supported(flat.scalar_type()), op, ": the flat buffer has shape ",
      shape_text(flat), "; it must be a contiguous vector of float32, bfloat16 or float16");
  return flat.scalar_type();
}

}  // namespace jdkd::pack

STABLE_TORCH_LIBRARY_FRAGMENT(jdkd_C, m) {
  // parts, pieces and index are a table of jdkd/ops/pack_table.py; packed gradients are dense as packed weights
  // are; flat of unpack holds zeros; the CPU cuts its pieces itself
  m.def("pack(Tensor[] weights, Tensor parts, Tensor? pieces, Tensor index, Tensor(a!) flat) -> ()");
  m.def("unpack_add_(Tensor(a!)[] gradients, Tensor parts, Tensor? pieces, Tensor index, Tensor[] packed) -> ()");
  m.def("unpack(Tensor[] packed, Tensor parts, Tensor? pieces, Tensor index, Tensor(a!) flat) -> ()");
}
