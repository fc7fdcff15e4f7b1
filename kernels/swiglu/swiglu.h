// The loops of SwiGLU, by format: y = gate * sigmoid(gate) * up.
#pragma once

#include "cpu/isa.h"

namespace dllm {

struct Swiglu {
  const void *grad, *gate, *up;  // grad null in a forward
  void *out, *grad_up;           // out: y, or the gradient of gate
};

struct SwigluLoops {
  void (*forward[kFormats])(const Swiglu&, int64_t first, int64_t last);
  void (*backward[kFormats])(const Swiglu&, int64_t first, int64_t last);
};

DLLM_LOOPS(SwigluLoops, swiglu)

}  // namespace dllm
