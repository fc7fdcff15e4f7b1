// What every op asks of its tensors, on torch's stable ABI: a tensor that does not fit is an error with names and
// sizes, never a crash.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/isa.h"

namespace dllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& x) {
  std::string text = "[";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

inline Format format_of(const Tensor& x, const char* op, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Format::fp32;
    case ScalarType::BFloat16: return Format::bf16;
    case ScalarType::Half: return Format::fp16;
    default:
      STD_TORCH_CHECK(false, "dist_llm::", op, ": ", name, " must be float32, bfloat16 or float16, not ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

inline void require_cpu(const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), "dist_llm::", op, ": ", name, " must be on the CPU");
}

inline void require_same_shape(const Tensor& x, const Tensor& like, const char* op, const char* names) {
  bool same = x.dim() == like.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == like.size(i);
  STD_TORCH_CHECK(same, "dist_llm::", op, ": ", names, " must have one shape, not ", shape_of(x), " and ", shape_of(like));
}

inline void require_same_format(const Tensor& x, const Tensor& like, const char* op, const char* names) {
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), "dist_llm::", op, ": ", names, " must have one dtype, not ",
                  torch::headeronly::toString(x.scalar_type()), " and ",
                  torch::headeronly::toString(like.scalar_type()));
}

// x as rows of its last dim.
struct Rows {
  int64_t count, width;
};

inline Rows rows_of(const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(x.dim() >= 1, "dist_llm::", op, ": ", name, " must have at least one dim");
  const int64_t width = x.size(x.dim() - 1);
  return {width ? x.numel() / width : 0, width};
}

// A vector of `width` in any of the formats, as fp32: weights may be wider than activations.
inline Tensor as_fp32_vector(const Tensor& x, int64_t width, const char* op, const char* name) {
  require_cpu(x, op, name);
  format_of(x, op, name);
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == width, "dist_llm::", op, ": ", name, " must be [", width, "], not ",
                  shape_of(x));
  const Tensor flat = torch::stable::contiguous(x);
  return flat.scalar_type() == ScalarType::Float ? flat : torch::stable::to(flat, ScalarType::Float);
}

inline Tensor empty_fp32(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

// One fp32 number for each row of x: x's shape without the last dim.
inline Tensor empty_row_numbers(const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  return empty_fp32(x, shape);
}

inline Tensor empty_dense(const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < x.dim(); ++i) shape.push_back(x.size(i));
  return torch::stable::new_empty(x, shape);
}

// Rows dealt out in parts that depend on their number alone: sums over parts are then the same for any number of
// threads.
struct Parts {
  int64_t rows, size, count;
  explicit Parts(int64_t rows) : rows(rows), size(std::max<int64_t>(16, (rows + 63) / 64)), count((rows + size - 1) / size) {}
  int64_t first(int64_t part) const { return part * size; }
  int64_t last(int64_t part) const { return std::min(rows, (part + 1) * size); }
};

// How many rows of a width are worth a thread.
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

// The sum over parts, each of them `width` numbers, `stride` apart, in the format of `like`.
inline Tensor sum_of_parts(const float* parts, int64_t count, int64_t width, int64_t stride, const Tensor& like) {
  Tensor sum = empty_fp32(like, {width});
  float* out = static_cast<float*>(sum.mutable_data_ptr());
  torch::stable::parallel_for(0, width, 4096, [&](int64_t first, int64_t last) {
    std::fill(out + first, out + last, 0.0f);
    for (int64_t part = 0; part < count; ++part)
      for (int64_t i = first; i < last; ++i) out[i] += parts[part * stride + i];
  });
  return like.scalar_type() == ScalarType::Float ? sum : torch::stable::to(sum, like.scalar_type());
}

}  // namespace dllm
