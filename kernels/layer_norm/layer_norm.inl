// Three passes over a row, all but the first in cache: mean, variance about it, results. Sums are in fp32.
#include "cpu/vector.h"
#include "layer_norm/layer_norm.h"

namespace dllm {
namespace DLLM_ISA {
namespace {

template <class T>
void forward(const LayerNormForward& op, int64_t first, int64_t last) {
  const int64_t n = op.width;
  const float* __restrict w = op.weight;
  const float* __restrict b = op.bias;
  for (int64_t row = first; row < last; ++row) {
    const T* __restrict x = static_cast<const T*>(op.x) + row * n;
    T* __restrict y = static_cast<T*>(op.normed) + row * n;
    if (op.residual != nullptr) {
      const T* __restrict residual = static_cast<const T*>(op.residual) + row * n;
      T* __restrict total = static_cast<T*>(op.total) + row * n;
      DLLM_SIMD for (int64_t i = 0; i < n; ++i) store(total, i, load(x, i) + load(residual, i));
      x = total;
    }
    // Of the stored sum, in the same order: adding beforehand, as a recomputed norm does, gives the same bits.
    const float sum = sum_over(n, [=](int64_t i) __attribute__((always_inline)) { return load(x, i); });
    const float mean = sum / float(n);
    const float squares = sum_over(n, [=](int64_t i) __attribute__((always_inline)) {
      const float centred = load(x, i) - mean;
      return centred * centred;
    });
    const float rstd = 1.0f / __builtin_sqrtf(squares / float(n) + op.eps);
    op.mean[row] = mean;
    op.rstd[row] = rstd;
    if (b != nullptr) {
      DLLM_SIMD for (int64_t i = 0; i < n; ++i) store(y, i, (load(x, i) - mean) * rstd * w[i] + b[i]);
    } else {
      DLLM_SIMD for (int64_t i = 0; i < n; ++i) store(y, i, (load(x, i) - mean) * rstd * w[i]);
    }
  }
}

template <class T>
void backward(const LayerNormBackward& op, float* grad_scale, int64_t first, int64_t last) {
  const int64_t n = op.width;
  const float* __restrict w = op.weight;
  float* __restrict grad_weight = grad_scale;
  float* __restrict grad_bias = grad_scale + n;
  for (int64_t row = first; row < last; ++row) {
    const T* __restrict x = static_cast<const T*>(op.x) + row * n;
    const T* __restrict grad = static_cast<const T*>(op.grad) + row * n;
    T* __restrict out = static_cast<T*>(op.grad_x) + row * n;
    const float mean = op.mean[row], rstd = op.rstd[row];
    float sum = 0.0f, dot = 0.0f;
    _Pragma("omp simd reduction(+ : sum, dot)") for (int64_t i = 0; i < n; ++i) {
      const float scaled = load(grad, i) * w[i];
      sum += scaled;
      dot += scaled * (load(x, i) - mean);
    }
    // A product last would be fused with the sum below in one of the loops alone: they would differ in bits.
    const float level = sum / float(n), along = dot * rstd * rstd * rstd / float(n);
    if (op.grad_total != nullptr) {
      const T* __restrict more = static_cast<const T*>(op.grad_total) + row * n;
      DLLM_SIMD for (int64_t i = 0; i < n; ++i) {
        const float g = load(grad, i), centred = load(x, i) - mean;
        grad_weight[i] += g * centred * rstd;
        grad_bias[i] += g;
        store(out, i, rounded_as<T>((g * w[i] - level) * rstd - centred * along) + load(more, i));
      }
    } else {
      DLLM_SIMD for (int64_t i = 0; i < n; ++i) {
        const float g = load(grad, i), centred = load(x, i) - mean;
        grad_weight[i] += g * centred * rstd;
        grad_bias[i] += g;
        store(out, i, (g * w[i] - level) * rstd - centred * along);
      }
    }
  }
}

}  // namespace
}  // namespace DLLM_ISA

extern const LayerNormLoops DLLM_TABLE(layer_norm);
const LayerNormLoops DLLM_TABLE(layer_norm) = {
    {DLLM_ISA::forward<float>, DLLM_ISA::forward<DLLM_ISA::BFloat16>, DLLM_ISA::forward<DLLM_ISA::Float16>},
    {DLLM_ISA::backward<float>, DLLM_ISA::backward<DLLM_ISA::BFloat16>, DLLM_ISA::backward<DLLM_ISA::Float16>},
};

}  // namespace dllm
