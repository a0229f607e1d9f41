#include "common/checks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(jdkd_C, m) {
  // (loss [], losses [L], coefficients [2, 5, sum of C], the gradients of the loss by the students), the first three
  // float32. One dtype, float32 or bfloat16, contiguous, and every level planned by pearson_plan.
  m.def(
      "pearson_single(Tensor[] students, Tensor[] teachers, float[] weights, float eps, bool skip_constant)"
      " -> (Tensor, Tensor, Tensor, Tensor[])");
  // the first three, on a CPU, and the gradients into memory that is given; students and teachers may differ in dtype
  m.def(
      "pearson_single_into(Tensor[] students, Tensor[] teachers, float[] weights, float eps, bool skip_constant,"
      " Tensor(a!)[] gradients) -> (Tensor, Tensor, Tensor)");
  // gradients *= dloss, one float32 value; leaves at once where it is 1
  m.def("pearson_scale_(Tensor(a!)[] gradients, Tensor dloss) -> ()");
  // what pearson_plan asks of a device: SMs, shared memory per block and per SM, largest cluster (0: cannot run there)
  m.def("pearson_single_chip(int device) -> int[]");
}
