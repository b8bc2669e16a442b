// The pair loss on CUDA: one block per pair sums its four sequences in a fixed order, and one
// thread does the arithmetic of pair_math.h.
#include "launch.h"
#include "launch_kernel.h"

namespace rmipo {
namespace {

constexpr int kThreads = 128;

// Mean of tokens [start, end) in double, the same in every thread. Wrong borders give NaN and
// raise the flag; an empty sequence is 0 / 0 = NaN.
template <typename T>
__device__ double block_mean(const T* tokens, int64_t start, int64_t end, int64_t num_tokens,
                             int32_t* flag, double* shared) {
  if (!valid_borders(start, end, num_tokens)) {  // the same branch in every thread
    if (threadIdx.x == 0) *flag = 1;
    return NAN;
  }
  double sum = 0;
  for (int64_t i = start + threadIdx.x; i < end; i += kThreads) sum += double(tokens[i]);
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) shared[threadIdx.x] += shared[threadIdx.x + step];
    __syncthreads();
  }
  const double mean = shared[0] / double(end - start);
  // Without this the next sequence's sums would overwrite shared[0] before all have read it.
  __syncthreads();
  return mean;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pairs_kernel(PairPointers<T> a, PairOptions options) {
  __shared__ double shared[kThreads];
  const int64_t p = blockIdx.x;
  double means[2], prior[2] = {NAN, NAN};
  bool prior_defined = a.prior_borders != nullptr;
  for (int side = 0; side < 2; ++side) {
    const int64_t s = 2 * p + side;
    means[side] =
        block_mean(a.token_logps, a.borders[s], a.borders[s + 1], a.num_tokens, a.flag, shared);
    if (a.prior_borders != nullptr) {
      const int64_t start = a.prior_borders[s], end = a.prior_borders[s + 1];
      prior[side] = block_mean(a.prior_token_logps, start, end, a.num_prior_tokens, a.flag, shared);
      prior_defined = prior_defined && start != end;
    }
  }
  if (threadIdx.x != 0) return;
  for (int side = 0; side < 2; ++side) {
    a.logps[2 * p + side] = T(means[side]);
    a.prior_logps[2 * p + side] = T(prior[side]);
  }
  write_pair(p, means, prior, prior_defined, options, a.loss, a.gamma, a.gap, a.mean_grads);
}

template <typename T>
cudaError_t launch(const PairPointers<T>& a, int64_t num_pairs, const PairOptions& options,
                   cudaStream_t stream) {
  if (num_pairs == 0) return cudaSuccess;
  return launch_kernel(pairs_kernel<T>, num_pairs, kThreads, stream, a, options);
}

}  // namespace

cudaError_t launch_pairs(const PairPointers<float>& a, int64_t num_pairs,
                         const PairOptions& options, cudaStream_t stream) {
  return launch(a, num_pairs, options, stream);
}

cudaError_t launch_pairs(const PairPointers<double>& a, int64_t num_pairs,
                         const PairOptions& options, cudaStream_t stream) {
  return launch(a, num_pairs, options, stream);
}

}  // namespace rmipo
