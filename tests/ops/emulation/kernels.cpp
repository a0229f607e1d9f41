// The CUDA operators of jdkd with their own sources, kernels and launchers, compiled for the host.
#include "runtime_on_host.h"

extern "C" int planted = 0;  // the number of a bug, in a copy of the sources that has some

#define CUDA CPU  // the dispatch key they are registered for
#include "cuda/pack.cu"
#include "cuda/pearson_single.cu"
#include "cuda/pearson_split.cu"
#include "ops/pack.cpp"
#include "ops/pearson.cpp"
#include "ops/pearson_plan.cpp"
#include "ops/pearson_single.cpp"
