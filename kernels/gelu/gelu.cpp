// dist_llm::gelu, bias_gelu and their backwards on the CPU. dist_llm/ops/gelu.py has the reference.
#include "gelu/gelu.h"

#include <tuple>

#include "tensor.h"

namespace dllm {
namespace {

Tensor run_forward(const Tensor& x, const Tensor* bias) {
  const char* op = bias ? "bias_gelu" : "gelu";
  require_cpu(x, op, "x");
  const Format format = format_of(x, op, "x");
  const Rows rows = rows_of(x, op, "x");
  const Tensor dense = torch::stable::contiguous(x);
  Tensor shift, out = empty_dense(dense);
  Gelu call{nullptr, dense.const_data_ptr(), nullptr, out.mutable_data_ptr(), rows.width};
  if (bias != nullptr) {
    shift = as_fp32_vector(*bias, rows.width, op, "bias");
    call.bias = static_cast<const float*>(shift.const_data_ptr());
  }
  const auto loop = gelu_loops().forward[int(format)];
  torch::stable::parallel_for(0, rows.count, grain(rows.width), [&](int64_t first, int64_t last) { loop(call, first, last); });
  return out;
}

Tensor gelu(const Tensor& x) { return run_forward(x, nullptr); }

Tensor bias_gelu(const Tensor& x, const Tensor& bias) { return run_forward(x, &bias); }

// Returns the gradient of x; where there is a bias its own goes to grad_bias.
Tensor run_backward(const Tensor& grad, const Tensor& x, const Tensor* bias, Tensor* grad_bias) {
  const char* op = bias ? "bias_gelu_backward" : "gelu_backward";
  require_cpu(x, op, "x");
  require_cpu(grad, op, "grad");
  const Format format = format_of(x, op, "x");
  const Rows rows = rows_of(x, op, "x");
  require_same_shape(grad, x, op, "grad and x");
  require_same_format(grad, x, op, "grad and x");
  const Tensor g = torch::stable::contiguous(grad), dense = torch::stable::contiguous(x);
  Tensor out = empty_dense(dense);
  Gelu call{g.const_data_ptr(), dense.const_data_ptr(), nullptr, out.mutable_data_ptr(), rows.width};
  const auto loop = gelu_loops().backward[int(format)];
  if (bias == nullptr) {
    torch::stable::parallel_for(0, rows.count, grain(rows.width), [&](int64_t first, int64_t last) {
      loop(call, nullptr, first, last);
    });
    return out;
  }
  const Tensor shift = as_fp32_vector(*bias, rows.width, op, "bias");
  call.bias = static_cast<const float*>(shift.const_data_ptr());
  const Parts parts(rows.count);
  std::vector<float> sums(size_t(parts.count * rows.width), 0.0f);
  torch::stable::parallel_for(0, parts.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      loop(call, sums.data() + part * rows.width, parts.first(part), parts.last(part));
  });
  *grad_bias = sum_of_parts(sums.data(), parts.count, rows.width, rows.width, *bias);
  return out;
}

Tensor gelu_backward(const Tensor& grad, const Tensor& x) { return run_backward(grad, x, nullptr, nullptr); }

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x, const Tensor& bias) {
  Tensor grad_bias;
  Tensor grad_x = run_backward(grad, x, &bias, &grad_bias);
  return {grad_x, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dist_llm, m) {
  m.def("gelu(Tensor x) -> Tensor");
  m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
  m.def("gelu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("gelu", TORCH_BOX(&gelu));
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
}

}  // namespace dllm
