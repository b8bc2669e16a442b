// Refusals at the border between torch and raw pointers. The message names the operator, the
// argument, what was wanted and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace rmipo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A dense vector of n elements on the device of `like`.
inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t n,
                         ScalarType dtype, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, op, ": ", name, " must have shape (", n,
                  ",), got ", t.dim(), " dimensions with ", t.numel(), " elements");
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have dtype ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
                  op, ": ", name, " must be on the device of the first argument");
  STD_TORCH_CHECK(n <= 1 || t.stride(0) == 1, op, ": ", name, " must be contiguous, got stride ",
                  n <= 1 ? 1 : t.stride(0));
}

// A matrix of the given shape whose rows are dense; the row stride is free.
inline void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows,
                         int64_t columns, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(),
                  op, ": ", name, " must be on the device of the first argument");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op, ": ", name,
                  " must have shape (", rows, ", ", columns, "), got ", t.dim(),
                  " dimensions with ", t.numel(), " elements");
  STD_TORCH_CHECK(columns <= 1 || t.stride(1) == 1, op, ": ", name,
                  " must have dense rows, got column stride ", columns <= 1 ? 1 : t.stride(1));
  STD_TORCH_CHECK(rows <= 1 || t.stride(0) >= columns, op, ": ", name,
                  " must have rows that don't overlap, got row stride ",
                  rows <= 1 ? columns : t.stride(0), " for ", columns, " columns");
}

template <typename T>
const T* const_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

}  // namespace rmipo
