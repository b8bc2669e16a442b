// The CUDA kernels as a library for the CPU: C functions around their launches.
#include "../../csrc/cuda/launch.h"

namespace {

// With factors in one read, as bfloat16 heads are.
template <typename A>
int rows(const void* logits, int64_t count, int64_t vocab_size, int64_t logits_stride,
         const int64_t* target_ids, const void* bias, double softcap, double scale,
         const void* row_scale, void* logps, void* grads, int64_t grads_stride, int grad_type,
         int32_t* flag, float* factors) {
  const rmipo::RowArguments<A> arguments{static_cast<const A*>(logits),
                                         count,
                                         vocab_size,
                                         logits_stride,
                                         target_ids,
                                         static_cast<const A*>(bias),
                                         {static_cast<A>(softcap), static_cast<A>(scale)},
                                         static_cast<const A*>(row_scale),
                                         static_cast<A*>(logps),
                                         grads,
                                         grads_stride,
                                         static_cast<rmipo::GradType>(grad_type),
                                         flag,
                                         factors};
  if constexpr (sizeof(A) == 4) {
    if (factors != nullptr) return rmipo::launch_exponentials(arguments, nullptr);
  }
  return rmipo::launch_rows(arguments, nullptr);
}

template <typename T>
int pairs(int64_t num_pairs, const void* tokens, const int32_t* borders, int64_t num_tokens,
          const void* prior_tokens, const int32_t* prior_borders, int64_t num_prior_tokens,
          const rmipo::PairOptions& options, void* const* out, int32_t* flag) {
  T* to[6];
  for (int i = 0; i < 6; ++i) to[i] = static_cast<T*>(out[i]);
  return rmipo::launch_pairs(
      rmipo::PairPointers<T>{static_cast<const T*>(tokens), borders, num_tokens,
                             static_cast<const T*>(prior_tokens), prior_borders, num_prior_tokens,
                             to[0], to[1], to[2], to[3], to[4], to[5], flag},
      num_pairs, options, nullptr);
}

}  // namespace

extern "C" int run_rows(int is_double, const void* logits, int64_t count, int64_t vocab_size,
                        int64_t logits_stride, const int64_t* target_ids, const void* bias,
                        double softcap, double scale, const void* row_scale, void* logps,
                        void* grads, int64_t grads_stride, int grad_type, int32_t* flag,
                        float* factors) {
  return is_double
             ? rows<double>(logits, count, vocab_size, logits_stride, target_ids, bias, softcap,
                            scale, row_scale, logps, grads, grads_stride, grad_type, flag, nullptr)
             : rows<float>(logits, count, vocab_size, logits_stride, target_ids, bias, softcap,
                           scale, row_scale, logps, grads, grads_stride, grad_type, flag, factors);
}

// options: loss_type, beta, gamma_min, gamma_max, gamma_scaled_by_beta, label_smoothing,
// simpo_gamma. out: loss, gamma, gap, logps, prior_logps, mean_grads.
extern "C" int run_pairs(int is_double, int64_t num_pairs, const void* tokens,
                         const int32_t* borders, int64_t num_tokens, const void* prior_tokens,
                         const int32_t* prior_borders, int64_t num_prior_tokens,
                         const double* options, void* const* out, int32_t* flag) {
  const rmipo::PairOptions o{static_cast<rmipo::LossType>(options[0]),
                             options[1],
                             options[2],
                             options[3],
                             options[4] != 0,
                             options[5],
                             options[6]};
  return (is_double ? pairs<double> : pairs<float>)(num_pairs, tokens, borders, num_tokens,
                                                    prior_tokens, prior_borders, num_prior_tokens,
                                                    o, out, flag);
}
