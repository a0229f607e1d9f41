// What the launchers ask CUDA and torch for, on the host.
//
// Operators are registered for tensors of the CPU, under a name of their own that the compiler is given for jdkd_C. The
// device of a tensor is the chip that was chosen last.
#pragma once

#include "hopper_on_host.h"

#include "common/cuda.h"

namespace emulation {

struct Chip {
  int64_t sms, shared_per_block, shared_per_sm, max_cluster;
};
inline std::vector<Chip> chips = {{1, 232448, 233472, 16}};
inline int chip = 0;

}  // namespace emulation

extern "C" {

inline __attribute__((used)) void choose_chip(int64_t sms, int64_t block, int64_t sm, int64_t cluster) {
  emulation::chips.push_back({sms, block, sm, cluster});
  emulation::chip = static_cast<int>(emulation::chips.size()) - 1;
}

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = emulation::chip;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  const emulation::Chip& chip = emulation::chips[device];
  *value = static_cast<int>(
      which == cudaDevAttrMultiProcessorCount            ? chip.sms
      : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? chip.shared_per_block
                                                         : chip.shared_per_sm);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t* config) {
  *count = config->attrs[0].val.clusterDim.x <= emulation::chips[emulation::chip].max_cluster;
  return cudaSuccess;
}

}  // extern "C"

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, Kernel*) {
  found->ptxVersion = 90;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
