// Memory is read once for statistics, and read and written once for the gradient. Sums over a piece are in fp32, over
// the pieces of a row in fp64.
#include "cpu/vector.h"
#include "cross_entropy/cross_entropy.h"

namespace dllm {
namespace DLLM_ISA {
namespace {

// Logits that stay in the first cache between the search for their maximum and the sum relative to it.
constexpr int64_t kPiece = 1024;

// exp of what is at most 0; where `exponential` ends this is 0, so that a logit of -inf weighs nothing.
inline float decayed(float x) { return x < -87.0f ? 0.0f : exponential(x); }

// The maximum in four parts, as in sum_over; a NaN counts as nothing.
template <class T>
inline float top_of(const T* __restrict z, int64_t n) {
  const int64_t part = n / 4;
  float a = -__builtin_inff(), b = a, c = a, d = a;
  _Pragma("omp simd reduction(max : a, b, c, d)") for (int64_t i = 0; i < part; ++i) {
    const float p = load(z, i), q = load(z, i + part), r = load(z, i + 2 * part), s = load(z, i + 3 * part);
    a = p > a ? p : a;
    b = q > b ? q : b;
    c = r > c ? r : c;
    d = s > d ? s : d;
  }
  for (int64_t i = 4 * part; i < n; ++i) a = load(z, i) > a ? load(z, i) : a;
  a = b > a ? b : a;
  c = d > c ? d : c;
  return c > a ? c : a;
}

template <class T>
void statistics(const CrossEntropyStatistics& op, int64_t first, int64_t last) {
  const VocabularyPart part = op.part;
  for (int64_t row = first; row < last; ++row) {
    const T* __restrict z = static_cast<const T*>(op.logits) + row * part.columns;
    if (op.targets[row] == part.ignored) {  // of no use, and nothing that makes a NaN once ranks have added it up
      op.top[row] = op.target[row] = op.plain[row] = 0.0f;
      op.raised[row] = 1.0f;
      continue;
    }
    float top = -__builtin_inff();
    double raised = 0.0, plain = 0.0;
    for (int64_t begin = 0; begin < part.valid; begin += kPiece) {
      const T* __restrict piece = z + begin;
      const int64_t n = part.valid - begin < kPiece ? part.valid - begin : kPiece;
      const float here = top_of(piece, n), higher = here > top ? here : top;
      const float from = higher == -__builtin_inff() ? 0.0f : higher;  // so far nothing but -inf
      raised *= decayed(top - from);
      float sum = 0.0f, all = 0.0f;
      _Pragma("omp simd reduction(+ : sum, all)") for (int64_t i = 0; i < n; ++i) {
        const float v = load(piece, i);
        sum += decayed(v - from);
        all += v;
      }
      raised += sum;
      plain += all;
      top = higher;
    }
    // Neither the maximum nor exp shows a NaN; the plain sum does. With +inf the formula is inf - inf.
    const bool broken = plain != plain || top == __builtin_inff();
    const int64_t local = op.targets[row] - part.start;
    op.top[row] = top;
    op.raised[row] = broken ? __builtin_nanf("") : float(raised);
    op.target[row] = local >= 0 && local < part.valid ? load(z, local) : 0.0f;
    op.plain[row] = float(plain);
  }
}

template <class T>
void gradient(const CrossEntropyGradient& op, int64_t first, int64_t last) {
  const VocabularyPart part = op.part;
  for (int64_t row = first; row < last; ++row) {
    T* __restrict z = static_cast<T*>(op.logits) + row * part.columns;
    const int64_t used = op.targets[row] == part.ignored ? 0 : part.valid;
    if (used > 0) {
      const float top = op.top[row], grad = op.grad[row * op.grad_stride], uniform = op.uniform;
      // From the maximum, not from the log of the sum: its rounding would be in every probability.
      float scale = 1.0f / op.raised[row];
      if (op.z_loss != 0.0f) scale *= 1.0f + 2.0f * op.z_loss * (top + __builtin_logf(op.raised[row]));
      const int64_t local = op.targets[row] - part.start;
      const bool here = local >= 0 && local < used;
      const float target = here ? decayed(load(z, local) - top) * scale - uniform : 0.0f;
      DLLM_SIMD for (int64_t i = 0; i < used; ++i) store(z, i, (decayed(load(z, i) - top) * scale - uniform) * grad);
      if (here) store(z, local, (target - (1.0f - op.smoothing)) * grad);
    }
    for (int64_t i = used; i < part.columns; ++i) store(z, i, 0.0f);
  }
}

}  // namespace
}  // namespace DLLM_ISA

extern const CrossEntropyLoops DLLM_TABLE(cross_entropy);
const CrossEntropyLoops DLLM_TABLE(cross_entropy) = {
    {DLLM_ISA::statistics<float>, DLLM_ISA::statistics<DLLM_ISA::BFloat16>, DLLM_ISA::statistics<DLLM_ISA::Float16>},
    {DLLM_ISA::gradient<float>, DLLM_ISA::gradient<DLLM_ISA::BFloat16>, DLLM_ISA::gradient<DLLM_ISA::Float16>},
};

}  // namespace dllm
