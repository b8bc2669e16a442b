// Row work of linear_logps on CUDA in one read: 6 bytes an element where rows_kernel moves 10.
//
// Exponentials are taken relative to the target's logit, which is known before the row is read, not
// to the largest: bfloat16 has float32's exponents, so that e^69 has room. With
// e_v = exp(z_v - z_y) and others = the sum of all but the target's,
//
//   logp = -log(1 + others),   d logp / d z_v = -e_v / (1 + others),   for the target's own others
//
// in e_v's place. Rows that have no such numbers, or none with a distribution, are left to
// rows_kernel: not scored, outside the vocabulary, not finite, larger sums.
#include "launch.h"
#include "launch_kernel.h"
#include "row_packs.h"

namespace rmipo {
namespace {

constexpr float kLargestSum = 1e30f;  // times a weight still far from float32's end

template <bool kBias, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, 2) exponentials_kernel(RowArguments<float> a) {
  __shared__ float sums[kThreads];
  const int64_t row = blockIdx.x;
  const int64_t id = a.target_ids[row];
  const float* x = a.logits + row_offset(row, a.logits_stride, 0);
  auto* grads = static_cast<__nv_bfloat16*>(a.grads) + row_offset(row, a.grads_stride, 0);
  const auto transformed = [&](float product, int64_t v) {
    if (kBias) product += a.bias[v];
    product *= a.transform.scale;
    return kSoftcap ? a.transform.softcap * tanhf(product / a.transform.softcap) : product;
  };
  const bool is_scored = classify(id, a.vocab_size) == Target::kScored;
  const float at_target = is_scored ? transformed(x[id], id) : INFINITY;
  if (!isfinite(at_target)) {
    if (threadIdx.x == 0) a.factors[row] = kAgain;
    return;
  }
  // Of a logit by its product. Without a softcap it is one number, which the row's factor takes.
  const auto slope = [&](float logit) { return kSoftcap ? a.transform.slope(logit) : 1.0f; };
  float sum = 0;
  const int64_t head = unaligned_head(x, grads, a.vocab_size);
  for_row(
      head, a.vocab_size,
      [&](int64_t v) {
        float logits[kPack], e[kPack];
        load(x + v, logits);
        float terms = 0;
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          logits[i] = transformed(logits[i], v + i);
          e[i] = exp(logits[i] - at_target);
        }
        if (v <= id && id < v + kPack) {
#pragma unroll
          for (int i = 0; i < kPack; ++i) e[i] = v + i == id ? 0 : e[i];
        }
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          terms += e[i];
          e[i] *= slope(logits[i]);
        }
        sum += terms;
        store(e, grads + v);
      },
      [&](int64_t v) {
        const float logit = transformed(x[v], v);
        const float e = v == id ? 0 : exp(logit - at_target);
        sum += e;
        store(e * slope(logit), grads + v);
      });
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  const float others = sums[0];
  if (!(others <= kLargestSum)) {  // NaN too
    a.factors[row] = kAgain;
    return;
  }
  a.logps[row] = -log1p(others);
  a.factors[row] = -(kSoftcap ? 1.0f : a.transform.scale) / (1 + others);
  store(-others * slope(at_target), grads + id);  // the barriers above are after what the loop put
}

}  // namespace

cudaError_t launch_exponentials(const RowArguments<float>& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const bool softcap = a.transform.softcap > 0;
  const auto kernel =
      a.bias == nullptr
          ? (softcap ? exponentials_kernel<false, true> : exponentials_kernel<false, false>)
          : (softcap ? exponentials_kernel<true, true> : exponentials_kernel<true, false>);
  const cudaError_t error = launch_kernel(kernel, a.rows, kThreads, stream, a);
  return error == cudaSuccess ? launch_rows(a, stream) : error;
}

}  // namespace rmipo
