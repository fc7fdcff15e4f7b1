// The loops of cross entropy over one rank's part of a vocabulary, by format of the logits.
#pragma once

#include "cpu/isa.h"

namespace dllm {

// Columns [0, valid) of `columns` are tokens [start, start + valid); the others are padding.
struct VocabularyPart {
  int64_t columns, start, valid, ignored;  // ignored: the target of a row that is not counted
};

struct CrossEntropyStatistics {
  const void* logits;
  const int64_t* targets;
  float *top, *raised, *target, *plain;  // of each row: maximum, sum of exp(z - top), the target's z or 0, sum of z
  VocabularyPart part;
};

struct CrossEntropyGradient {
  void* logits;
  const int64_t* targets;
  const float *grad, *top, *raised;  // top, raised: over the whole vocabulary
  int64_t grad_stride;               // 0: one number for all rows
  VocabularyPart part;
  float uniform;  // smoothing over the size of the whole vocabulary
  float smoothing, z_loss;
};

struct CrossEntropyLoops {
  void (*statistics[kFormats])(const CrossEntropyStatistics&, int64_t first, int64_t last);
  void (*gradient[kFormats])(const CrossEntropyGradient&, int64_t first, int64_t last);
};

DLLM_LOOPS(CrossEntropyLoops, cross_entropy)

}  // namespace dllm
