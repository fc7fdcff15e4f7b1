// dist_llm::layer_norm, add_layer_norm and layer_norm_backward on the CPU. dist_llm/ops/layer_norm.py has the reference.
#include "layer_norm/layer_norm.h"

#include <tuple>

#include "tensor.h"

namespace dllm {
namespace {

struct Normed {
  Tensor normed, total, mean, rstd;
};

Normed run_forward(const Tensor& x, const Tensor* residual, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  const char* op = residual ? "add_layer_norm" : "layer_norm";
  require_cpu(x, op, "x");
  const Format format = format_of(x, op, "x");
  const Rows rows = rows_of(x, op, "x");
  const Tensor dense = torch::stable::contiguous(x), w = as_fp32_vector(weight, rows.width, op, "weight");
  Tensor other, b;
  Normed out{empty_dense(dense), Tensor(), empty_row_numbers(dense), empty_row_numbers(dense)};
  LayerNormForward call{dense.const_data_ptr(), nullptr, static_cast<const float*>(w.const_data_ptr()), nullptr,
                        out.normed.mutable_data_ptr(), nullptr, static_cast<float*>(out.mean.mutable_data_ptr()),
                        static_cast<float*>(out.rstd.mutable_data_ptr()), rows.width, float(eps)};
  if (bias.has_value()) {
    b = as_fp32_vector(*bias, rows.width, op, "bias");
    call.bias = static_cast<const float*>(b.const_data_ptr());
  }
  if (residual != nullptr) {
    require_cpu(*residual, op, "residual");
    require_same_shape(*residual, x, op, "residual and x");
    require_same_format(*residual, x, op, "residual and x");
    other = torch::stable::contiguous(*residual);
    out.total = empty_dense(dense);
    call.residual = other.const_data_ptr();
    call.total = out.total.mutable_data_ptr();
  }
  const auto loop = layer_norm_loops().forward[int(format)];
  torch::stable::parallel_for(0, rows.count, grain(rows.width), [&](int64_t first, int64_t last) { loop(call, first, last); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  const Normed out = run_forward(x, nullptr, weight, bias, eps);
  return {out.normed, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                          const std::optional<Tensor>& bias, double eps) {
  const Normed out = run_forward(x, &residual, weight, bias, eps);
  return {out.normed, out.total, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const std::optional<Tensor>& grad_total,
                                                       const Tensor& x, const Tensor& weight, const Tensor& mean,
                                                       const Tensor& rstd) {
  const char* op = "layer_norm_backward";
  require_cpu(x, op, "x");
  require_cpu(grad, op, "grad");
  const Format format = format_of(x, op, "x");
  const Rows rows = rows_of(x, op, "x");
  require_same_shape(grad, x, op, "grad and x");
  require_same_format(grad, x, op, "grad and x");
  for (const Tensor* numbers : {&mean, &rstd}) {
    require_cpu(*numbers, op, "mean and rstd");
    STD_TORCH_CHECK(numbers->scalar_type() == ScalarType::Float && (rows.width == 0 || numbers->numel() == rows.count),
                    "dist_llm::layer_norm_backward: mean and rstd must be float32 and have a number for each row, not ",
                    shape_of(*numbers));
  }
  const Tensor g = torch::stable::contiguous(grad), dense = torch::stable::contiguous(x),
               m = torch::stable::contiguous(mean), r = torch::stable::contiguous(rstd),
               w = as_fp32_vector(weight, rows.width, op, "weight");
  Tensor more, grad_x = empty_dense(dense);
  LayerNormBackward call{g.const_data_ptr(), nullptr, dense.const_data_ptr(), static_cast<const float*>(w.const_data_ptr()),
                         static_cast<const float*>(m.const_data_ptr()), static_cast<const float*>(r.const_data_ptr()),
                         grad_x.mutable_data_ptr(), rows.width};
  if (grad_total.has_value()) {
    require_cpu(*grad_total, op, "grad_total");
    require_same_shape(*grad_total, x, op, "grad_total and x");
    require_same_format(*grad_total, x, op, "grad_total and x");
    more = torch::stable::contiguous(*grad_total);
    call.grad_total = more.const_data_ptr();
  }
  const Parts parts(rows.count);
  const int64_t both = 2 * rows.width;
  std::vector<float> sums(size_t(parts.count * both), 0.0f);
  const auto loop = layer_norm_loops().backward[int(format)];
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) loop(call, sums.data() + part * both, parts.first(part), parts.last(part));
  });
  const Tensor grad_weight = sum_of_parts(sums.data(), parts.count, rows.width, both, weight);
  return {grad_x, grad_weight, sum_of_parts(sums.data() + rows.width, parts.count, rows.width, both, weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dist_llm, m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("layer_norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace dllm
