// Two passes over a row, which the second finds in cache: statistics, then results. Sums are in fp32.
#include "cpu/vector.h"
#include "rms_norm/rms_norm.h"

namespace dllm {
namespace DLLM_ISA {
namespace {

template <class T>
void forward(const RmsNormForward& op, int64_t first, int64_t last) {
  const int64_t n = op.width;
  const float* __restrict w = op.weight;
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
    const float squares = sum_over(n, [=](int64_t i) __attribute__((always_inline)) { return load(x, i) * load(x, i); });
    const float rstd = 1.0f / __builtin_sqrtf(squares / float(n) + op.eps);
    op.rstd[row] = rstd;
    DLLM_SIMD for (int64_t i = 0; i < n; ++i) store(y, i, load(x, i) * rstd * w[i]);
  }
}

template <class T>
void backward(const RmsNormBackward& op, float* __restrict grad_weight, int64_t first, int64_t last) {
  const int64_t n = op.width;
  const float* __restrict w = op.weight;
  for (int64_t row = first; row < last; ++row) {
    const T* __restrict x = static_cast<const T*>(op.x) + row * n;
    const T* __restrict grad = static_cast<const T*>(op.grad) + row * n;
    T* __restrict out = static_cast<T*>(op.grad_x) + row * n;
    const float rstd = op.rstd[row];
    float dot = 0.0f;
    _Pragma("omp simd reduction(+ : dot)") for (int64_t i = 0; i < n; ++i) dot += load(grad, i) * w[i] * load(x, i);
    const float along = dot * rstd * rstd * rstd / float(n);
    if (op.grad_total != nullptr) {
      const T* __restrict more = static_cast<const T*>(op.grad_total) + row * n;
      DLLM_SIMD for (int64_t i = 0; i < n; ++i) {
        const float g = load(grad, i), v = load(x, i);
        grad_weight[i] += g * v * rstd;
        store(out, i, rounded_as<T>(g * w[i] * rstd - v * along) + load(more, i));
      }
    } else {
      DLLM_SIMD for (int64_t i = 0; i < n; ++i) {
        const float g = load(grad, i), v = load(x, i);
        grad_weight[i] += g * v * rstd;
        store(out, i, g * w[i] * rstd - v * along);
      }
    }
  }
}

}  // namespace
}  // namespace DLLM_ISA

extern const RmsNormLoops DLLM_TABLE(rms_norm);
const RmsNormLoops DLLM_TABLE(rms_norm) = {
    {DLLM_ISA::forward<float>, DLLM_ISA::forward<DLLM_ISA::BFloat16>, DLLM_ISA::forward<DLLM_ISA::Float16>},
    {DLLM_ISA::backward<float>, DLLM_ISA::backward<DLLM_ISA::BFloat16>, DLLM_ISA::backward<DLLM_ISA::Float16>},
};

}  // namespace dllm
