// The loops of LayerNorm, by format: y = (s - mean) * rstd * w + b with s = x, or x + residual where there is one.
#pragma once

#include "cpu/isa.h"

namespace dllm {

struct LayerNormForward {
  const void *x, *residual;    // residual null: none
  const float *weight, *bias;  // bias null: none
  void *normed, *total;        // total: s, where there is a residual
  float *mean, *rstd;
  int64_t width;
  float eps;
};

struct LayerNormBackward {
  const void *grad, *grad_total;  // grad_total null: none
  const void* x;                  // s
  const float *weight, *mean, *rstd;
  void* grad_x;
  int64_t width;
};

struct LayerNormLoops {
  void (*forward[kFormats])(const LayerNormForward&, int64_t first, int64_t last);
  // Adds to grad_scale[2, width]: the gradients of weight and bias.
  void (*backward[kFormats])(const LayerNormBackward&, float* grad_scale, int64_t first, int64_t last);
};

DLLM_LOOPS(LayerNormLoops, layer_norm)

}  // namespace dllm
