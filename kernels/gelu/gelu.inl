// One pass; without a bias rows follow each other as one. (1 + tanh(u)) / 2 is sigmoid(2u), which keeps its digits where
// the former cancels.
#include "cpu/vector.h"
#include "gelu/gelu.h"

namespace dllm {
namespace DLLM_ISA {
namespace {

constexpr float kTwice = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kCube = 0.044715f;

inline __attribute__((always_inline)) float gelu(float v) {
  return v * sigmoid(v * (kTwice + kTwice * kCube * (v * v)));
}

// s + v s (1 - s) (2u)', s = sigmoid(2u); 1 - s is e s with e = exp(-2u), which does not cancel.
inline __attribute__((always_inline)) float gelu_slope(float v) {
  const float square = v * v;
  const float e = exponential(-v * (kTwice + kTwice * kCube * square));
  const float s = 1.0f / (1.0f + e);
  return s + v * (kTwice + 3.0f * kTwice * kCube * square) * (e * s) * s;
}

template <class T>
void forward(const Gelu& op, int64_t first, int64_t last) {
  const int64_t n = op.bias == nullptr ? (last - first) * op.width : op.width;
  const float* __restrict bias = op.bias;
  for (int64_t row = first; row < last; row += bias == nullptr ? last - first : 1) {
    const T* __restrict x = static_cast<const T*>(op.x) + row * op.width;
    T* __restrict y = static_cast<T*>(op.out) + row * op.width;
    if (bias == nullptr) {
      DLLM_SIMD for (int64_t i = 0; i < n; ++i) store(y, i, gelu(load(x, i)));
    } else {
      DLLM_SIMD for (int64_t i = 0; i < n; ++i) store(y, i, gelu(load(x, i) + bias[i]));
    }
  }
}

template <class T>
void backward(const Gelu& op, float* __restrict grad_bias, int64_t first, int64_t last) {
  const int64_t n = op.bias == nullptr ? (last - first) * op.width : op.width;
  const float* __restrict bias = op.bias;
  for (int64_t row = first; row < last; row += bias == nullptr ? last - first : 1) {
    const T* __restrict x = static_cast<const T*>(op.x) + row * op.width;
    const T* __restrict grad = static_cast<const T*>(op.grad) + row * op.width;
    T* __restrict out = static_cast<T*>(op.out) + row * op.width;
    if (bias == nullptr) {
      DLLM_SIMD for (int64_t i = 0; i < n; ++i) store(out, i, load(grad, i) * gelu_slope(load(x, i)));
    } else {
      DLLM_SIMD for (int64_t i = 0; i < n; ++i) {
        const float g = load(grad, i) * gelu_slope(load(x, i) + bias[i]);
        grad_bias[i] += g;
        store(out, i, g);
      }
    }
  }
}

}  // namespace
}  // namespace DLLM_ISA

extern const GeluLoops DLLM_TABLE(gelu);
const GeluLoops DLLM_TABLE(gelu) = {
    {DLLM_ISA::forward<float>, DLLM_ISA::forward<DLLM_ISA::BFloat16>, DLLM_ISA::forward<DLLM_ISA::Float16>},
    {DLLM_ISA::backward<float>, DLLM_ISA::backward<DLLM_ISA::BFloat16>, DLLM_ISA::backward<DLLM_ISA::Float16>},
};

}  // namespace dllm
