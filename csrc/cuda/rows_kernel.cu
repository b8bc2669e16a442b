// Row work of linear_logps on CUDA: one block per row, two reads and one write of the chunk (a row
// of 128k logits doesn't fit shared memory). Reductions run in a fixed order, so that two runs
// give the same bits; nothing synchronises with the host.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace rmipo {
namespace {

constexpr int kThreads = 512;

// Running maximum and sum of exp(x - maximum).
template <typename A>
struct MaxSum {
  A max, sum;

  __device__ void add(A x) {
    if (x > max) {
      sum = sum * exp(max - x) + A(1);
      max = x;
    } else if (x != -INFINITY) {  // written so that NaN passes and poisons the sum
      sum += exp(x - max);
    }
  }
  __device__ void merge(MaxSum other) {
    if (other.max == -INFINITY) {  // nothing but a possible NaN in its sum
      sum += other.sum;
    } else if (other.max > max) {
      sum = sum * exp(max - other.max) + other.sum;
      max = other.max;
    } else {
      sum += other.sum * exp(other.max - max);
    }
  }
};

// float -> the type of the derivative; torch's flags forbid the implicit conversions.
__device__ void store(float* p, float x) { *p = x; }
__device__ void store(double* p, double x) { *p = x; }
__device__ void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16(x); }
__device__ void store(__half* p, float x) { *p = __float2half(x); }

template <typename A, typename G>
__global__ void __launch_bounds__(kThreads) rows_kernel(RowArguments<A> a) {
  __shared__ MaxSum<A> shared[kThreads];
  __shared__ A shared_logp_terms[2];  // maximum, log of the sum
  const int64_t row = blockIdx.x;
  const int64_t id = a.target_ids[row];
  G* grads = a.grad_type == GradType::kNone
                 ? nullptr
                 : static_cast<G*>(a.grads) + row_offset(row, a.grads_stride, 0);
  const Target kind = classify(id, a.vocab_size);
  if (kind != Target::kScored) {  // the row's logits are not read
    const A value = kind == Target::kIgnored ? A(0) : A(NAN);
    if (threadIdx.x == 0) {
      a.logps[row] = value;
      if (kind == Target::kInvalid) *a.flag = 1;
    }
    if (grads != nullptr) {
      for (int64_t v = threadIdx.x; v < a.vocab_size; v += kThreads) store(grads + v, value);
    }
    return;
  }
  const A* x = a.logits + row_offset(row, a.logits_stride, 0);
  const auto logit = [&](int64_t v) {
    return a.transform.logit(x[v], a.bias == nullptr ? A(0) : a.bias[v]);
  };
  // Read before any derivative is written: grads may be the same memory.
  const A at_target = logit(id);
  MaxSum<A> mine{-INFINITY, A(0)};
  for (int64_t v = threadIdx.x; v < a.vocab_size; v += kThreads) mine.add(logit(v));
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) shared[threadIdx.x].merge(shared[threadIdx.x + step]);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    // A row that holds +inf has no distribution.
    const A largest = shared[0].max == INFINITY ? A(NAN) : shared[0].max;
    shared_logp_terms[0] = largest;
    shared_logp_terms[1] = log(shared[0].sum);
    a.logps[row] = (at_target - largest) - shared_logp_terms[1];
  }
  if (grads == nullptr) return;
  // Without this the other threads would read the two terms before they are written.
  __syncthreads();
  const A largest = shared_logp_terms[0], log_sum = shared_logp_terms[1];
  const A scale = a.row_scale == nullptr ? A(1) : a.row_scale[row];
  for (int64_t v = threadIdx.x; v < a.vocab_size; v += kThreads) {
    const A l = logit(v);
    // The one at the target is subtracted before rounding to 16 bits.
    const A grad = (v == id ? A(1) : A(0)) - exp((l - largest) - log_sum);
    store(grads + v, grad * scale * a.transform.slope(l));
  }
}

template <typename A, typename G>
cudaError_t launch(const RowArguments<A>& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  rows_kernel<A, G><<<static_cast<unsigned>(a.rows), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_rows(const RowArguments<float>& a, cudaStream_t stream) {
  switch (a.grad_type) {
    case GradType::kBFloat16:
      return launch<float, __nv_bfloat16>(a, stream);
    case GradType::kHalf:
      return launch<float, __half>(a, stream);
    default:
      return launch<float, float>(a, stream);
  }
}

cudaError_t launch_rows(const RowArguments<double>& a, cudaStream_t stream) {
  return launch<double, double>(a, stream);
}

}  // namespace rmipo
