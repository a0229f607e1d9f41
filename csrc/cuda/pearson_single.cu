// Launchers of the single pass of the Pearson loss, and their registration.
#include "cuda/pearson_single.cuh"

#include "common/cuda.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>

namespace jdkd::pearson::single {
namespace {

using torch::headeronly::ScalarType;

constexpr int kScaleThreads = 1024;
constexpr int kScaleBatch = 2;  // vectors of a thread in flight
constexpr int kSumThreads = 1024;
constexpr int kSumBatch = 8;  // parts of a thread under way

// First part of the loss of every level, and the end of the last.
struct Parts {
  int64_t first[kMaxLevels + 1];
  int count;
  int thread_bits;  // 2^thread_bits threads add up a level, at least two warps
};

// The losses of the levels and their sum. Grid: one block, its threads shared out to the levels, which do not wait for
// each other. Reads: one float64 a channel and rank. Deterministic: yes.
__global__ void __launch_bounds__(kSumThreads) pearson_single_sum_kernel(
    const __grid_constant__ Parts ends, const double* __restrict__ parts, float* __restrict__ losses,
    float* __restrict__ loss) {
  __shared__ double warps[kSumThreads / 32];
  __shared__ double totals[kMaxLevels];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int level = threadIdx.x >> ends.thread_bits, threads = 1 << ends.thread_bits;
  double total = 0;
  if (level < ends.count) {
    const int64_t end = ends.first[level + 1];
    for (int64_t i = ends.first[level] + threadIdx.x % threads; i < end; i += kSumBatch * threads) {
      double part[kSumBatch];
#pragma unroll
      for (int j = 0; j < kSumBatch; ++j) {
        part[j] = i + j * threads < end ? parts[i + j * threads] : 0;
      }
#pragma unroll
      for (int j = 0; j < kSumBatch; ++j) {
        total += part[j];
      }
    }
  }
  total = warp_sum(total);
  if (lane == 0) {
    warps[warp] = total;
  }
  __syncthreads();
  if (warp < ends.count) {
    const int count = threads / 32;  // warps of a level
    total = warp_sum(lane < count ? warps[warp * count + lane] : 0);
    if (lane == 0) {
      totals[warp] = total;
      losses[warp] = static_cast<float>(total);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double all = 0;
    for (int i = 0; i < ends.count; ++i) {
      all += totals[i];
    }
    *loss = static_cast<float>(all);
  }
}

struct Gradients {
  void* data[kMaxLevels];
  int64_t elements[kMaxLevels];
  int count;
};

// Grid: any; a block an SM, as most of the time there is nothing to do. Reads: dloss; the gradients, where it is not 1.
// Writes: the gradients times dloss, rounded once.
template <typename T, int V>
__global__ void __launch_bounds__(kScaleThreads)
    pearson_scale_kernel(const __grid_constant__ Gradients gradients, const float* __restrict__ dloss) {
  const float factor = *dloss;
  if (factor == 1.0f) {
    return;
  }
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int level = 0; level < gradients.count; ++level) {
    T* data = static_cast<T*>(gradients.data[level]);
    auto* wide = reinterpret_cast<Vector<T, V>*>(data);
    const bool aligned = reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
    const int64_t elements = gradients.elements[level], vectors = aligned ? elements / V : 0;
    for (int64_t first = thread; first < vectors; first += kScaleBatch * threads) {
      Vector<T, V> values[kScaleBatch];
#pragma unroll
      for (int i = 0; i < kScaleBatch; ++i) {
        if (first + i * threads < vectors) {
          values[i] = wide[first + i * threads];
        }
      }
#pragma unroll
      for (int i = 0; i < kScaleBatch; ++i) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          assign(values[i].at[j], factor * as_float(values[i].at[j]));
        }
        if (first + i * threads < vectors) {
          wide[first + i * threads] = values[i];
        }
      }
    }
    for (int64_t i = vectors * V + thread; i < elements; i += threads) {
      assign(data[i], factor * as_float(data[i]));
    }
  }
}

cudaLaunchConfig_t configuration(
    int64_t clusters, int cluster, int warps, int64_t shared_bytes, cudaStream_t stream, cudaLaunchAttribute& shape) {
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = static_cast<unsigned>(cluster);
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
  config.blockDim = dim3(static_cast<unsigned>(32 * warps));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &shape;
  config.numAttrs = 1;
  return config;
}

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // else whoever launches next would report it again
  }
  check(error == cudaSuccess, "pearson_single: ", what, ": ", cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "asking the device for its limits");
  return value;
}

// Lets one kernel use all shared memory and clusters of 16.
template <class Kernel>
void open_limits(Kernel* kernel, int shared_per_block) {
  const auto set = [&](cudaFuncAttribute which, int value) {
    check_cuda(cudaFuncSetAttribute(kernel, which, value), "raising the limits of the kernel");
  };
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, shared_per_block);
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// The largest cluster of blocks that each fill an SM; 0 where this build has no code with clusters for the device.
int largest_cluster(int shared_per_block) {
  auto* kernel = &pearson_single_kernel<float, 4>;
  cudaFuncAttributes compiled{};
  const cudaError_t found = cudaFuncGetAttributes(&compiled, kernel);
  if (found == cudaErrorNoKernelImageForDevice || found == cudaErrorInvalidDeviceFunction ||
      found == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    return 0;
  }
  check_cuda(found, "reading the kernel's attributes");
  if (compiled.ptxVersion < 90) {
    return 0;  // the body is empty below sm_90
  }
  open_limits(kernel, shared_per_block);
  open_limits(&pearson_single_kernel<float, 1>, shared_per_block);
  open_limits(&pearson_single_kernel<__nv_bfloat16, 8>, shared_per_block);
  open_limits(&pearson_single_kernel<__nv_bfloat16, 1>, shared_per_block);
  for (int cluster = kMaxCluster; cluster > 1; cluster /= 2) {
    cudaLaunchAttribute shape{};
    const cudaLaunchConfig_t config = configuration(1, cluster, kMaxWarps, shared_per_block, nullptr, shape);
    int active = 0;
    if (cudaOccupancyMaxActiveClusters(&active, kernel, &config) != cudaSuccess) {
      cudaGetLastError();  // a size that the device does not have
    } else if (active > 0) {
      return cluster;
    }
  }
  return 1;
}

Chip chip_of(int device) {
  static std::mutex mutex;
  static std::map<int, Chip> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) {
    return found->second;
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  const int shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const Chip chip{
      attribute(cudaDevAttrMultiProcessorCount, device), shared_per_block,
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), largest_cluster(shared_per_block)};
  return known.emplace(device, chip).first->second;
}

std::vector<int64_t> pearson_single_chip(int64_t device) {
  const Chip chip = chip_of(static_cast<int>(device));
  return {chip.sms, chip.shared_per_block, chip.shared_per_sm, chip.max_cluster};
}

void check_kind(const char* op, const std::vector<Tensor>& tensors, const Tensor& like) {
  for (const Tensor& tensor : tensors) {
    check(
        tensor.scalar_type() == like.scalar_type() &&
            (like.scalar_type() == ScalarType::Float || like.scalar_type() == ScalarType::BFloat16),
        op, ": all levels must be of one dtype, float32 or bfloat16");
    check(tensor.get_device_index() == like.get_device_index(), op, ": all levels must be on one device");
    check(
        tensor.dim() == 4 && is_dense_nchw(tensor), op, ": a level of shape ", shape_text(tensor),
        " is not contiguous [N, C, H, W]; copy it to that");
  }
}

// Whether every tensor begins at a 16-byte boundary.
bool are_aligned(const std::vector<Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0;
  });
}

Plan plan_of(const std::vector<Level>& levels, int itemsize, int device) {
  const Chip chip = chip_of(device);
  check(
      chip.max_cluster > 0,
      "pearson_single: jdkd._C has no code of sm_90 for this device; use pearson_fwd and pearson_bwd");
  std::vector<Shape> shapes;
  for (const Level& level : levels) {
    shapes.push_back({level.n, level.c, level.hw});
  }
  Plan plan = make_plan(shapes, itemsize, chip);
  for (size_t i = 0; i < levels.size(); ++i) {
    check(
        plan.levels[i].launch >= 0, "pearson_single: a channel of level ", i, ", ", levels[i].n, " x ", levels[i].hw,
        " positions of both tensors, does not fit on the chip; use pearson_fwd and pearson_bwd");
  }
  return plan;
}

template <typename T, int V>
void launch(const LaunchPlan& plan, const Args& args, cudaStream_t stream) {
  check(
      plan.clusters * plan.cluster <= 0x7fffffff, "pearson_single: ", plan.clusters,
      " clusters are more than a grid holds");
  cudaLaunchAttribute shape{};
  const cudaLaunchConfig_t config =
      configuration(plan.clusters, plan.cluster, plan.warps, plan.shared_bytes, stream, shape);
  check_cuda(cudaLaunchKernelEx(&config, &pearson_single_kernel<T, V>, args), "launching");
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> pearson_single(
    std::vector<Tensor> students, std::vector<Tensor> teachers, std::vector<double> weights, double eps,
    bool skip_constant) {
  constexpr auto kOp = "pearson_single";
  const std::vector<Level> levels = describe_levels(kOp, students, teachers);
  check_weights(kOp, weights, levels);
  check_kind(kOp, students, students[0]);
  check_kind(kOp, teachers, students[0]);
  check(levels.size() <= kMaxLevels, kOp, ": ", levels.size(), " levels were given; it takes at most ", kMaxLevels);
  const bool wide = students[0].scalar_type() == ScalarType::Float;
  const int device = students[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Plan plan = plan_of(levels, wide ? 4 : 2, device);
  const int64_t columns = total_channels(levels);
  const auto empty = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(students[0], sizes, type);
  };
  const int64_t count = static_cast<int64_t>(levels.size());
  Tensor loss = empty({}, ScalarType::Float), losses = empty({count}, ScalarType::Float);
  Tensor table = empty({2, kRows, columns}, ScalarType::Float);
  std::vector<Tensor> gradients;
  Parts ends{{}, static_cast<int>(count), bits_of(kSumThreads) - bits_of(count)};
  for (size_t i = 0; i < levels.size(); ++i) {
    gradients.push_back(torch::stable::empty_like(students[i]));
    ends.first[i + 1] = ends.first[i] + levels[i].c * plan.levels[i].geometry.ranks();
  }
  Tensor parts = empty({ends.first[count]}, ScalarType::Double);
  const cudaStream_t stream = current_stream(students[0]);
  const bool aligned = are_aligned(students) && are_aligned(teachers) && are_aligned(gradients);
  for (const LaunchPlan& one : plan.launches) {
    Args args{};
    std::fill_n(args.first_cluster, kMaxLevels, std::numeric_limits<int>::max());
    for (size_t place = 0; place < one.levels.size(); ++place) {
      const int i = one.levels[place];
      args.first_cluster[place] = static_cast<int>(plan.levels[i].first_cluster);
      args.at[place] = {
          students[i].const_data_ptr(), teachers[i].const_data_ptr(), gradients[i].mutable_data_ptr(),
          plan.levels[i].geometry,      levels[i].first_channel,      ends.first[i],
          weights[i] / levels[i].c};
    }
    args.table = table.mutable_data_ptr<float>();
    args.parts = parts.mutable_data_ptr<double>();
    args.columns = columns;
    args.eps = eps;
    args.skip_constant = skip_constant;
    if (wide) {
      (aligned ? launch<float, 4> : launch<float, 1>)(one, args, stream);
    } else {
      (aligned ? launch<__nv_bfloat16, 8> : launch<__nv_bfloat16, 1>)(one, args, stream);
    }
  }
  launch_kernel(
      "pearson_single_sum", pearson_single_sum_kernel, 1, kSumThreads, stream, ends, parts.mutable_data_ptr<double>(),
      losses.mutable_data_ptr<float>(), loss.mutable_data_ptr<float>());
  return {loss, losses, table, gradients};
}

void pearson_scale_(std::vector<Tensor> gradients, Tensor dloss) {
  constexpr auto kOp = "pearson_scale_";
  check(
      dloss.numel() == 1 && dloss.scalar_type() == ScalarType::Float, kOp, ": dloss has shape ", shape_text(dloss),
      "; it must be one float32 value");
  check(
      !gradients.empty() && gradients.size() <= kMaxLevels, kOp, ": ", gradients.size(),
      " gradients were given; it takes 1 to ", kMaxLevels);
  check_kind(kOp, gradients, gradients[0]);
  check(
      dloss.get_device_index() == gradients[0].get_device_index(), kOp,
      ": dloss is not on the device of the gradients; move it there");
  Gradients args{};
  int64_t most = 0;
  for (Tensor& gradient : gradients) {
    args.data[args.count] = gradient.mutable_data_ptr();
    args.elements[args.count++] = gradient.numel();
    most = std::max(most, gradient.numel());
  }
  const int device = gradients[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  constexpr int64_t kPerBlock = 8 * kScaleThreads;  // elements, about, that are worth a block
  const int64_t blocks = std::min<int64_t>((most + kPerBlock - 1) / kPerBlock, chip_of(device).sms);
  const cudaStream_t stream = current_stream(gradients[0]);
  const float* factor = dloss.const_data_ptr<float>();
  const bool wide = gradients[0].scalar_type() == ScalarType::Float;
  const auto kernel = wide ? pearson_scale_kernel<float, 4> : pearson_scale_kernel<__nv_bfloat16, 8>;
  launch_kernel("pearson_scale", kernel, std::max<int64_t>(blocks, 1), kScaleThreads, stream, args, factor);
}

}  // namespace
}  // namespace jdkd::pearson::single

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CUDA, m) {
  m.impl("pearson_single", TORCH_BOX(&jdkd::pearson::single::pearson_single));
  m.impl("pearson_scale_", TORCH_BOX(&jdkd::pearson::single::pearson_scale_));
}

STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CompositeExplicitAutograd, m) {
  m.impl("pearson_single_chip", TORCH_BOX(&jdkd::pearson::single::pearson_single_chip));
}
