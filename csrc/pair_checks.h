// The arguments of pair_losses, checked once for the CPU and the CUDA library.
#pragma once

#include "checks.h"
#include "pair_math.h"

namespace rmipo {

inline LossType loss_type_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number < kNumLossTypes, "pair_losses: loss_type must be 0 to ",
                  kNumLossTypes - 1, ", got ", number);
  return static_cast<LossType>(number);
}

struct PairTensors {
  Tensor token_logps, cu_seqlens;
  std::optional<Tensor> prior_token_logps, prior_cu_seqlens;
  Tensor loss, gamma, gap, logps, prior_logps, mean_grads, flag;

  int64_t pairs() const { return loss.numel(); }

  void check() const {
    constexpr const char* kOp = "pair_losses";
    const auto dtype = token_logps.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp,
                    ": token_logps must be float32 or float64, got ",
                    torch::headeronly::toString(dtype));
    const int64_t p = pairs();
    check_vector(kOp, "token_logps", token_logps, token_logps.numel(), dtype, token_logps);
    check_vector(kOp, "cu_seqlens", cu_seqlens, 2 * p + 1, ScalarType::Int, token_logps);
    STD_TORCH_CHECK(prior_token_logps.has_value() == prior_cu_seqlens.has_value(), kOp,
                    ": prior_token_logps and prior_cu_seqlens go together");
    if (prior_token_logps) {
      check_vector(kOp, "prior_token_logps", *prior_token_logps, prior_token_logps->numel(), dtype,
                   token_logps);
      check_vector(kOp, "prior_cu_seqlens", *prior_cu_seqlens, 2 * p + 1, ScalarType::Int,
                   token_logps);
    }
    check_vector(kOp, "loss", loss, p, dtype, token_logps);
    check_vector(kOp, "gamma", gamma, p, dtype, token_logps);
    check_vector(kOp, "pmi_gap", gap, p, dtype, token_logps);
    check_vector(kOp, "logps", logps, 2 * p, dtype, token_logps);
    check_vector(kOp, "prior_logps", prior_logps, 2 * p, dtype, token_logps);
    check_vector(kOp, "mean_grads", mean_grads, 2 * p, dtype, token_logps);
    check_vector(kOp, "flag", flag, 1, ScalarType::Int, token_logps);
  }
};

// The raw pointers of the above, for kernels that see no torch header.
template <typename T>
PairPointers<T> pointers(const PairTensors& t) {
  const auto write = [](const Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); };
  return {static_cast<const T*>(t.token_logps.const_data_ptr()),
          static_cast<const int32_t*>(t.cu_seqlens.const_data_ptr()),
          t.token_logps.numel(),
          const_or_null<T>(t.prior_token_logps),
          const_or_null<int32_t>(t.prior_cu_seqlens),
          t.prior_token_logps ? t.prior_token_logps->numel() : 0,
          write(t.loss),
          write(t.gamma),
          write(t.gap),
          write(t.logps),
          write(t.prior_logps),
          write(t.mean_grads),
          static_cast<int32_t*>(t.flag.mutable_data_ptr())};
}

}  // namespace rmipo
