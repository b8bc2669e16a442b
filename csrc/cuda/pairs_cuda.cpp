// pair_losses for CUDA tensors: checks, device, stream.
#include <torch/csrc/stable/library.h>

#include "../pair_checks.h"
#include "stream.h"

namespace {

using rmipo::Tensor;

void pair_losses(Tensor token_logps, Tensor cu_seqlens, std::optional<Tensor> prior_token_logps,
                 std::optional<Tensor> prior_cu_seqlens, int64_t loss_type, double beta,
                 double gamma_min, double gamma_max, bool gamma_scaled_by_beta,
                 double label_smoothing, double simpo_gamma, Tensor loss, Tensor gamma, Tensor gap,
                 Tensor logps, Tensor prior_logps, Tensor mean_grads, Tensor flag) {
  constexpr const char* kOp = "pair_losses";
  const rmipo::PairTensors tensors{
      token_logps, cu_seqlens, prior_token_logps, prior_cu_seqlens, loss, gamma,
      gap,         logps,      prior_logps,       mean_grads,       flag};
  tensors.check();
  rmipo::check_grid(kOp, "loss", tensors.pairs());
  const rmipo::PairOptions options{rmipo::loss_type_of(loss_type),
                                   beta,
                                   gamma_min,
                                   gamma_max,
                                   gamma_scaled_by_beta,
                                   label_smoothing,
                                   simpo_gamma};
  const torch::stable::accelerator::DeviceGuard guard(token_logps.get_device_index());
  const cudaStream_t stream = rmipo::current_stream(token_logps);
  const bool single = token_logps.scalar_type() == rmipo::ScalarType::Float;
  rmipo::check_launch(kOp, single ? rmipo::launch_pairs(rmipo::pointers<float>(tensors),
                                                        tensors.pairs(), options, stream)
                                  : rmipo::launch_pairs(rmipo::pointers<double>(tensors),
                                                        tensors.pairs(), options, stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmipo_lite, CUDA, m) { m.impl("pair_losses", TORCH_BOX(&pair_losses)); }
