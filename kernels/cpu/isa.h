// Which instruction set the loops of a CPU run with: the widest that this processor has, picked once.
#pragma once

#include <cstdint>

namespace dllm {

enum class Isa { base, avx2, avx512 };

// The number formats in which loops come, in the order of their tables.
enum class Format { fp32, bf16, fp16 };
constexpr int kFormats = 3;

// The picked set. DIST_LLM_CPU_ISA=base|avx2|avx512 names another, which must be one that the processor has.
Isa picked_isa();
const char* isa_name(Isa isa);

// Declares the tables that the three compilations of `op`.inl define, and `op`_loops(), which returns the picked one.
#if defined(DLLM_X86)
#define DLLM_LOOPS(Table, op)                                                        \
  extern const Table op##_base, op##_avx2, op##_avx512;                              \
  inline const Table& op##_loops() {                                                 \
    static const Table* const all[] = {&op##_base, &op##_avx2, &op##_avx512};        \
    return *all[static_cast<int>(picked_isa())];                                     \
  }
#else
#define DLLM_LOOPS(Table, op)   \
  extern const Table op##_base; \
  inline const Table& op##_loops() { return op##_base; }
#endif

}  // namespace dllm
