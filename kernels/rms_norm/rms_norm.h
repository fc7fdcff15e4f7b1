// The loops of RMSNorm, by format: y = s * rsqrt(mean(s^2) + eps) * w with s = x, or x + residual where there is one.
#pragma once

#include "cpu/isa.h"

namespace dllm {

struct RmsNormForward {
  const void *x, *residual;  // residual null: none
  const float* weight;
  void *normed, *total;  // total: s, where there is a residual
  float* rstd;
  int64_t width;
  float eps;
};

struct RmsNormBackward {
  const void *grad, *grad_total;  // grad_total null: none
  const void* x;                  // s
  const float *weight, *rstd;
  void* grad_x;
  int64_t width;
};

struct RmsNormLoops {
  void (*forward[kFormats])(const RmsNormForward&, int64_t first, int64_t last);
  // Adds to grad_weight[width].
  void (*backward[kFormats])(const RmsNormBackward&, float* grad_weight, int64_t first, int64_t last);
};

DLLM_LOOPS(RmsNormLoops, rms_norm)

}  // namespace dllm
