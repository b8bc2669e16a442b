// row_logps and row_exponentials for CUDA tensors: checks, device, stream.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "stream.h"

namespace {

using rmipo::GradType;
using rmipo::ScalarType;
using rmipo::Tensor;

constexpr const char* kOp = "row_logps";
constexpr const char* kOnePass = "row_exponentials";

// What both want of their arguments.
void check_rows(const char* op, const Tensor& logits, const Tensor& target_ids,
                const std::optional<Tensor>& bias, const Tensor& logps, const Tensor& flag) {
  STD_TORCH_CHECK(logits.dim() == 2, op, ": logits must have shape (rows, vocab_size), got ",
                  logits.dim(), " dimensions");
  const int64_t n = logits.size(0), vocab_size = logits.size(1);
  rmipo::check_grid(op, "logits", n);
  rmipo::check_matrix(op, "logits", logits, n, vocab_size, logits);
  rmipo::check_vector(op, "target_ids", target_ids, n, ScalarType::Long, logits);
  rmipo::check_vector(op, "logps", logps, n, logits.scalar_type(), logits);
  rmipo::check_vector(op, "flag", flag, 1, ScalarType::Int, logits);
  if (bias) rmipo::check_vector(op, "bias", *bias, vocab_size, logits.scalar_type(), logits);
}

GradType grad_type(const std::optional<Tensor>& grads, ScalarType logits) {
  if (!grads) return GradType::kNone;
  const ScalarType dtype = grads->scalar_type();
  if (dtype == logits) return GradType::kSame;
  STD_TORCH_CHECK(
      logits == ScalarType::Float && (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half),
      kOp, ": grads must have the logits' dtype, bfloat16 or float16, got ",
      torch::headeronly::toString(dtype));
  return dtype == ScalarType::Half ? GradType::kHalf : GradType::kBFloat16;
}

template <typename A>
rmipo::RowArguments<A> row_arguments(const Tensor& logits, const Tensor& target_ids,
                                     const std::optional<Tensor>& bias, double logit_softcap,
                                     double logit_scale, const std::optional<Tensor>& row_scale,
                                     const Tensor& logps, const std::optional<Tensor>& grads,
                                     const Tensor& flag) {
  return {static_cast<const A*>(logits.const_data_ptr()),
          logits.size(0),
          logits.size(1),
          logits.stride(0),
          static_cast<const int64_t*>(target_ids.const_data_ptr()),
          rmipo::const_or_null<A>(bias),
          {static_cast<A>(logit_softcap), static_cast<A>(logit_scale)},
          rmipo::const_or_null<A>(row_scale),
          static_cast<A*>(logps.mutable_data_ptr()),
          grads ? grads->mutable_data_ptr() : nullptr,
          grads ? grads->stride(0) : 0,
          grad_type(grads, logits.scalar_type()),
          static_cast<int32_t*>(flag.mutable_data_ptr())};
}

template <typename A>
void rows(const rmipo::RowArguments<A>& arguments, const Tensor& logits) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  rmipo::check_launch(kOp, rmipo::launch_rows(arguments, rmipo::current_stream(logits)));
}

void row_logps(Tensor logits, Tensor target_ids, std::optional<Tensor> bias, double logit_softcap,
               double logit_scale, std::optional<Tensor> row_scale, Tensor logps,
               std::optional<Tensor> grads, Tensor flag) {
  const auto dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp,
                  ": logits must be float32 or float64, got ", torch::headeronly::toString(dtype));
  check_rows(kOp, logits, target_ids, bias, logps, flag);
  const int64_t n = logits.size(0), vocab_size = logits.size(1);
  if (row_scale) rmipo::check_vector(kOp, "row_scale", *row_scale, n, dtype, logits);
  if (grads) rmipo::check_matrix(kOp, "grads", *grads, n, vocab_size, logits);
  if (dtype == ScalarType::Float) {
    rows(row_arguments<float>(logits, target_ids, bias, logit_softcap, logit_scale, row_scale,
                              logps, grads, flag),
         logits);
  } else {
    rows(row_arguments<double>(logits, target_ids, bias, logit_softcap, logit_scale, row_scale,
                               logps, grads, flag),
         logits);
  }
}

// grads (bfloat16) times factors is the derivative; see exponentials_kernel.cu.
void row_exponentials(Tensor logits, Tensor target_ids, std::optional<Tensor> bias,
                      double logit_softcap, double logit_scale, Tensor logps, Tensor grads,
                      Tensor factors, Tensor flag) {
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, kOnePass,
                  ": logits must be float32, got ",
                  torch::headeronly::toString(logits.scalar_type()));
  STD_TORCH_CHECK(grads.scalar_type() == ScalarType::BFloat16, kOnePass,
                  ": grads must be bfloat16, got ",
                  torch::headeronly::toString(grads.scalar_type()));
  check_rows(kOnePass, logits, target_ids, bias, logps, flag);
  const int64_t n = logits.size(0);
  rmipo::check_matrix(kOnePass, "grads", grads, n, logits.size(1), logits);
  rmipo::check_vector(kOnePass, "factors", factors, n, ScalarType::Float, logits);
  auto arguments = row_arguments<float>(logits, target_ids, bias, logit_softcap, logit_scale,
                                        std::nullopt, logps, grads, flag);
  arguments.factors = static_cast<float*>(factors.mutable_data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  rmipo::check_launch(kOnePass,
                      rmipo::launch_exponentials(arguments, rmipo::current_stream(logits)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rmipo_lite, CUDA, m) {
  m.impl("row_logps", TORCH_BOX(&row_logps));
  m.impl("row_exponentials", TORCH_BOX(&row_exponentials));
}
