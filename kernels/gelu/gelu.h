// The loops of GELU in its tanh form, by format: y = v * sigmoid(2 c (v + a v^3)) with v = x, or x + bias where there is one.
#pragma once

#include "cpu/isa.h"

namespace dllm {

struct Gelu {
  const void* grad;   // null in a forward
  const void* x;
  const float* bias;  // null: none
  void* out;          // y, or the gradient of x
  int64_t width;
};

struct GeluLoops {
  void (*forward[kFormats])(const Gelu&, int64_t first, int64_t last);
  // Adds to grad_bias[width] where there is a bias.
  void (*backward[kFormats])(const Gelu&, float* grad_bias, int64_t first, int64_t last);
};

DLLM_LOOPS(GeluLoops, gelu)

}  // namespace dllm
