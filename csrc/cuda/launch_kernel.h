// The one place with the compiler's launch syntax, so that a plain C++ compiler can read the
// kernels: tests/cuda_on_cpu runs them without a GPU and brings a launch of its own.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <cstdint>

namespace rmipo {

// Launches blocks x threads of a kernel; the launch's error.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads,
                          cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace rmipo
#endif
