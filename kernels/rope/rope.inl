// One pass over tokens: the angles of one are read once for its heads of q and of k.
#include "cpu/vector.h"
#include "rope/rope.h"

namespace dllm {
namespace DLLM_ISA {
namespace {

template <class T>
inline void rotate_heads(const T* from, T* to, const float* __restrict cos, const float* __restrict sin, float direction,
                         int64_t heads, int64_t half) {
  for (int64_t head = 0; head < heads; ++head) {
    const T* __restrict a = from + 2 * half * head;
    T* __restrict out = to + 2 * half * head;
    DLLM_SIMD for (int64_t i = 0; i < half; ++i) {
      const float x = load(a, i), y = load(a, half + i), c = cos[i], s = sin[i] * direction;
      store(out, i, x * c - y * s);
      store(out, half + i, y * c + x * s);
    }
  }
}

template <class T>
void rotate(const Rope& op, int64_t first, int64_t last) {
  const int64_t half = op.half, query_width = 2 * half * op.query_heads, key_width = 2 * half * op.key_heads;
  for (int64_t token = first; token < last; ++token) {
    const float *cos = op.cos + token % op.seq * half, *sin = op.sin + token % op.seq * half;
    rotate_heads(static_cast<const T*>(op.query) + token * query_width, static_cast<T*>(op.query_out) + token * query_width,
                 cos, sin, op.direction, op.query_heads, half);
    rotate_heads(static_cast<const T*>(op.key) + token * key_width, static_cast<T*>(op.key_out) + token * key_width, cos, sin,
                 op.direction, op.key_heads, half);
  }
}

}  // namespace
}  // namespace DLLM_ISA

extern const RopeLoops DLLM_TABLE(rope);
const RopeLoops DLLM_TABLE(rope) = {
    {DLLM_ISA::rotate<float>, DLLM_ISA::rotate<DLLM_ISA::BFloat16>, DLLM_ISA::rotate<DLLM_ISA::Float16>},
};

}  // namespace dllm
