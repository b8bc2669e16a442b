// The pair loss on the CPU: means, PMI, gamma, loss and its derivatives in one pass over the
// tokens.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "../pair_checks.h"

namespace {

using rmipo::PairPointers;
using rmipo::Tensor;

// Mean of tokens [start, end) in double; NaN and a raised flag where the borders are wrong. An
// empty sequence is 0 / 0 = NaN.
template <typename T>
double mean(const T* tokens, int64_t start, int64_t end, int64_t num_tokens, int32_t* flag) {
  if (!rmipo::valid_borders(start, end, num_tokens)) {
    *flag = 1;
    return std::numeric_limits<double>::quiet_NaN();
  }
  double sum = 0;
  for (int64_t i = start; i < end; ++i) sum += static_cast<double>(tokens[i]);
  return sum / static_cast<double>(end - start);
}

template <typename T>
void pairs(const PairPointers<T>& a, int64_t num_pairs, const rmipo::PairOptions& options) {
  for (int64_t p = 0; p < num_pairs; ++p) {
    double means[2], prior[2] = {std::nan(""), std::nan("")};
    bool prior_defined = a.prior_borders != nullptr;
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t s = 2 * p + side;
      means[side] = mean(a.token_logps, a.borders[s], a.borders[s + 1], a.num_tokens, a.flag);
      a.logps[s] = static_cast<T>(means[side]);
      if (a.prior_borders != nullptr) {
        const int64_t start = a.prior_borders[s], end = a.prior_borders[s + 1];
        prior[side] = mean(a.prior_token_logps, start, end, a.num_prior_tokens, a.flag);
        prior_defined = prior_defined && start != end;
      }
      a.prior_logps[s] = static_cast<T>(prior[side]);
    }
    rmipo::write_pair(p, means, prior, prior_defined, options, a.loss, a.gamma, a.gap,
                      a.mean_grads);
  }
}

void pair_losses(Tensor token_logps, Tensor cu_seqlens, std::optional<Tensor> prior_token_logps,
                 std::optional<Tensor> prior_cu_seqlens, int64_t loss_type, double beta,
                 double gamma_min, double gamma_max, bool gamma_scaled_by_beta,
                 double label_smoothing, double simpo_gamma, Tensor loss, Tensor gamma, Tensor gap,
                 Tensor logps, Tensor prior_logps, Tensor mean_grads, Tensor flag) {
  const rmipo::PairTensors tensors{
      token_logps, cu_seqlens, prior_token_logps, prior_cu_seqlens, loss, gamma,
      gap,         logps,      prior_logps,       mean_grads,       flag};
  tensors.check();
  const rmipo::PairOptions options{rmipo::loss_type_of(loss_type),
                                   beta,
                                   gamma_min,
                                   gamma_max,
                                   gamma_scaled_by_beta,
                                   label_smoothing,
                                   simpo_gamma};
  if (token_logps.scalar_type() == rmipo::ScalarType::Float) {
    pairs(rmipo::pointers<float>(tensors), tensors.pairs(), options);
  } else {
    pairs(rmipo::pointers<double>(tensors), tensors.pairs(), options);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmipo_lite, CPU, m) { m.impl("pair_losses", TORCH_BOX(&pair_losses)); }
