// Device, stream and launch errors for the torch side of the CUDA library.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>

#include "launch.h"

namespace rmipo {

// torch's current stream on a device. Stream::nativeHandle would need torch 2.13.
inline cudaStream_t current_stream(const torch::stable::Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op,
                  ": launching the kernel failed: ", cudaGetErrorString(error));
}

// Blocks are counted in 31 bits.
inline void check_grid(const char* op, const char* name, int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), op, ": ", name,
                  " must have fewer than 2^31 rows, got ", blocks);
}

}  // namespace rmipo
