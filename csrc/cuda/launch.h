// What the torch side (*_cuda.cpp) calls of the kernels (*_kernel.cu): raw pointers, sizes, a
// stream. Each returns the launch's cudaError_t.
#pragma once

#include <cuda_runtime_api.h>

#include "../pair_math.h"

namespace rmipo {

enum class GradType { kNone, kSame, kBFloat16, kHalf };

// Strides in elements. grads may be the logits' own memory where grad_type is kSame.
template <typename A>
struct RowArguments {
  const A* logits;
  int64_t rows, vocab_size, logits_stride;
  const int64_t* target_ids;
  const A* bias;  // null: none
  Transform<A> transform;
  const A* row_scale;  // null: 1
  A* logps;
  void* grads;
  int64_t grads_stride;
  GradType grad_type;
  int32_t* flag;
  float* factors = nullptr;  // null: every row; else those alone whose factor is kAgain
};

// The factor of a row that the one pass leaves: its derivative is written as it is.
constexpr float kAgain = 1;

cudaError_t launch_rows(const RowArguments<float>& a, cudaStream_t stream);
cudaError_t launch_rows(const RowArguments<double>& a, cudaStream_t stream);

// The same in one read, for a derivative in bfloat16: grads times factors is the derivative.
cudaError_t launch_exponentials(const RowArguments<float>& a, cudaStream_t stream);

cudaError_t launch_pairs(const PairPointers<float>& a, int64_t num_pairs,
                         const PairOptions& options, cudaStream_t stream);
cudaError_t launch_pairs(const PairPointers<double>& a, int64_t num_pairs,
                         const PairOptions& options, cudaStream_t stream);

}  // namespace rmipo
