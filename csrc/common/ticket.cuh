// Which block of a launch ends last: the one that goes on to add up what all of them wrote.
#pragma once

namespace jdkd {

// Whether this block is the last of its grid to come here; it then sees what the others wrote before, if it reads past
// the first cache. No block waits for another. By the whole block, once in a launch. `ticket` is 0 when the launch
// begins: a launch before it in the same stream writes that, so that it may lie in memory of the call, which replays of
// a graph and streams do not share.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  __shared__ bool is_last;
  __syncthreads();  // what the block wrote comes before the first thread's fence
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (is_last) {
      __threadfence();
    }
  }
  __syncthreads();
  return is_last;
}

}  // namespace jdkd
