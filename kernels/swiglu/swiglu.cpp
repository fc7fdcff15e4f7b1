// dist_llm::swiglu and swiglu_backward on the CPU. dist_llm/ops/swiglu.py has the reference.
#include "swiglu/swiglu.h"

#include <tuple>

#include "tensor.h"

namespace dllm {
namespace {

constexpr int64_t kGrain = 16384;

Format check(const Tensor& gate, const Tensor& up, const char* op) {
  require_cpu(gate, op, "gate");
  require_cpu(up, op, "up");
  require_same_shape(up, gate, op, "up and gate");
  require_same_format(up, gate, op, "up and gate");
  return format_of(gate, op, "gate");
}

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  const Format format = check(gate, up, "swiglu");
  const Tensor g = torch::stable::contiguous(gate), u = torch::stable::contiguous(up);
  Tensor out = empty_dense(g);
  const Swiglu call{nullptr, g.const_data_ptr(), u.const_data_ptr(), out.mutable_data_ptr(), nullptr};
  const auto loop = swiglu_loops().forward[int(format)];
  torch::stable::parallel_for(0, g.numel(), kGrain, [&](int64_t first, int64_t last) { loop(call, first, last); });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const char* op = "swiglu_backward";
  const Format format = check(gate, up, op);
  require_cpu(grad, op, "grad");
  require_same_shape(grad, gate, op, "grad and gate");
  require_same_format(grad, gate, op, "grad and gate");
  const Tensor d = torch::stable::contiguous(grad), g = torch::stable::contiguous(gate), u = torch::stable::contiguous(up);
  Tensor grad_gate = empty_dense(g), grad_up = empty_dense(g);
  const Swiglu call{d.const_data_ptr(), g.const_data_ptr(), u.const_data_ptr(), grad_gate.mutable_data_ptr(),
                    grad_up.mutable_data_ptr()};
  const auto loop = swiglu_loops().backward[int(format)];
  torch::stable::parallel_for(0, g.numel(), kGrain, [&](int64_t first, int64_t last) { loop(call, first, last); });
  return {grad_gate, grad_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dist_llm, m) {
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace dllm
