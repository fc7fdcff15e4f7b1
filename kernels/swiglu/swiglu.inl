// One pass over elements.
#include "cpu/vector.h"
#include "swiglu/swiglu.h"

namespace dllm {
namespace DLLM_ISA {
namespace {

template <class T>
void forward(const Swiglu& op, int64_t first, int64_t last) {
  const T* __restrict gate = static_cast<const T*>(op.gate);
  const T* __restrict up = static_cast<const T*>(op.up);
  T* __restrict out = static_cast<T*>(op.out);
  DLLM_SIMD for (int64_t i = first; i < last; ++i) {
    const float g = load(gate, i);
    store(out, i, g * sigmoid(g) * load(up, i));
  }
}

// silu' = s (1 + g (1 - s)), s = sigmoid(g); 1 - s is e s with e = exp(-g), which does not cancel.
template <class T>
void backward(const Swiglu& op, int64_t first, int64_t last) {
  const T* __restrict grad = static_cast<const T*>(op.grad);
  const T* __restrict gate = static_cast<const T*>(op.gate);
  const T* __restrict up = static_cast<const T*>(op.up);
  T* __restrict grad_gate = static_cast<T*>(op.out);
  T* __restrict grad_up = static_cast<T*>(op.grad_up);
  DLLM_SIMD for (int64_t i = first; i < last; ++i) {
    const float d = load(grad, i), g = load(gate, i);
    const float e = exponential(-g);
    const float s = 1.0f / (1.0f + e);
    store(grad_gate, i, d * load(up, i) * (s + g * s * (e * s)));
    store(grad_up, i, d * (g * s));
  }
}

}  // namespace
}  // namespace DLLM_ISA

extern const SwigluLoops DLLM_TABLE(swiglu);
const SwigluLoops DLLM_TABLE(swiglu) = {
    {DLLM_ISA::forward<float>, DLLM_ISA::forward<DLLM_ISA::BFloat16>, DLLM_ISA::forward<DLLM_ISA::Float16>},
    {DLLM_ISA::backward<float>, DLLM_ISA::backward<DLLM_ISA::BFloat16>, DLLM_ISA::backward<DLLM_ISA::Float16>},
};

}  // namespace dllm
