// The loops of RoPE on q and k, by format: [a, b] -> [a cos - b sin, b cos + a sin], the halves of each head.
#pragma once

#include "cpu/isa.h"

namespace dllm {

struct Rope {
  const void *query, *key;  // [batch, seq, heads, 2 half]
  const float *cos, *sin;   // [seq, half]
  void *query_out, *key_out;
  int64_t seq, query_heads, key_heads, half;
  float direction;  // -1: the other way round
};

struct RopeLoops {
  void (*rotate[kFormats])(const Rope&, int64_t first, int64_t last);  // tokens of all sequences
};

DLLM_LOOPS(RopeLoops, rope)

}  // namespace dllm
