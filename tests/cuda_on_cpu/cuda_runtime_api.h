// What the kernels need of CUDA, on the CPU: a block is a crew of threads that meet at barriers,
// one block after the other. Slow, and exact enough to find a wrong index, a missing __syncthreads
// (under ThreadSanitizer) or a read outside a row (under AddressSanitizer) without a GPU.
#pragma once

#include <math.h>

#include <barrier>
#include <cstdint>
#include <thread>
#include <vector>

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

struct Index {
  int x;
};
inline thread_local Index threadIdx, blockIdx;
inline std::barrier<>* crew = nullptr;

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one by one
#define __syncthreads() crew->arrive_and_wait()

struct alignas(16) int4 {
  int x, y, z, w;
};

namespace rmipo {

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t,
                          const Arguments&... arguments) {
  std::barrier<> barrier(threads);
  crew = &barrier;
  std::vector<std::thread> members;
  for (int thread = 0; thread < threads; ++thread) {
    members.emplace_back([&, thread] {
      for (int64_t block = 0; block < blocks; ++block) {
        threadIdx = {thread};
        blockIdx = {static_cast<int>(block)};
        kernel(arguments...);
        barrier.arrive_and_wait();  // the next block takes over the shared memory
      }
    });
  }
  for (std::thread& member : members) member.join();
  return cudaSuccess;
}

}  // namespace rmipo
