// dist_llm::rms_norm, add_rms_norm and rms_norm_backward on the CPU. dist_llm/ops/rms_norm.py has the reference.
#include "rms_norm/rms_norm.h"

#include <tuple>

#include "tensor.h"

namespace dllm {
namespace {

Tensor run_forward(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, Tensor* total, Tensor& rstd) {
  const char* op = residual ? "add_rms_norm" : "rms_norm";
  require_cpu(x, op, "x");
  const Format format = format_of(x, op, "x");
  const Rows rows = rows_of(x, op, "x");
  const Tensor dense = torch::stable::contiguous(x), w = as_fp32_vector(weight, rows.width, op, "weight");
  Tensor other, normed = empty_dense(dense);
  rstd = empty_row_numbers(dense);
  RmsNormForward call{dense.const_data_ptr(), nullptr, static_cast<const float*>(w.const_data_ptr()),
                      normed.mutable_data_ptr(), nullptr, static_cast<float*>(rstd.mutable_data_ptr()), rows.width, float(eps)};
  if (residual != nullptr) {
    require_cpu(*residual, op, "residual");
    require_same_shape(*residual, x, op, "residual and x");
    require_same_format(*residual, x, op, "residual and x");
    other = torch::stable::contiguous(*residual);
    *total = empty_dense(dense);
    call.residual = other.const_data_ptr();
    call.total = total->mutable_data_ptr();
  }
  const auto loop = rms_norm_loops().forward[int(format)];
  torch::stable::parallel_for(0, rows.count, grain(rows.width), [&](int64_t first, int64_t last) { loop(call, first, last); });
  return normed;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Tensor rstd;
  Tensor normed = run_forward(x, nullptr, weight, eps, nullptr, rstd);
  return {normed, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  Tensor rstd, total;
  Tensor normed = run_forward(x, &residual, weight, eps, &total, rstd);
  return {normed, total, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const std::optional<Tensor>& grad_total, const Tensor& x,
                                             const Tensor& weight, const Tensor& rstd) {
  const char* op = "rms_norm_backward";
  require_cpu(x, op, "x");
  require_cpu(grad, op, "grad");
  require_cpu(rstd, op, "rstd");
  const Format format = format_of(x, op, "x");
  const Rows rows = rows_of(x, op, "x");
  require_same_shape(grad, x, op, "grad and x");
  require_same_format(grad, x, op, "grad and x");
  STD_TORCH_CHECK(rstd.scalar_type() == ScalarType::Float && (rows.width == 0 || rstd.numel() == rows.count),
                  "dist_llm::rms_norm_backward: rstd must be float32 and have a number for each row, not ", shape_of(rstd));
  const Tensor g = torch::stable::contiguous(grad), dense = torch::stable::contiguous(x),
               r = torch::stable::contiguous(rstd), w = as_fp32_vector(weight, rows.width, op, "weight");
  Tensor more, grad_x = empty_dense(dense);
  RmsNormBackward call{g.const_data_ptr(), nullptr, dense.const_data_ptr(), static_cast<const float*>(w.const_data_ptr()),
                       static_cast<const float*>(r.const_data_ptr()), grad_x.mutable_data_ptr(), rows.width};
  if (grad_total.has_value()) {
    require_cpu(*grad_total, op, "grad_total");
    require_same_shape(*grad_total, x, op, "grad_total and x");
    require_same_format(*grad_total, x, op, "grad_total and x");
    more = torch::stable::contiguous(*grad_total);
    call.grad_total = more.const_data_ptr();
  }
  const Parts parts(rows.count);
  std::vector<float> sums(size_t(parts.count * rows.width), 0.0f);
  const auto loop = rms_norm_loops().backward[int(format)];
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      loop(call, sums.data() + part * rows.width, parts.first(part), parts.last(part));
  });
  return {grad_x, sum_of_parts(sums.data(), parts.count, rows.width, rows.width, weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dist_llm, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace dllm
