// Picks the instruction set, and registers the op that names it: dist_llm::cpu_isa() -> str.
#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

namespace dllm {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512"};

bool has(Isa isa) {
#if defined(DLLM_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return isa == Isa::base;
}

Isa pick() {
  const char* wanted = std::getenv("DIST_LLM_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::base;
  for (int i = 0; i < 3; ++i)
    if (std::string(wanted) == kNames[i] && has(static_cast<Isa>(i))) return static_cast<Isa>(i);
  STD_TORCH_CHECK(false, "DIST_LLM_CPU_ISA=", wanted, " must be one that this processor has: base",
                  has(Isa::avx2) ? ", avx2" : "", has(Isa::avx512) ? ", avx512" : "");
}

std::string cpu_isa() { return isa_name(picked_isa()); }

}  // namespace

Isa picked_isa() {
  static const Isa picked = pick();
  return picked;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

STABLE_TORCH_LIBRARY_FRAGMENT(dist_llm, m) { m.def("cpu_isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(dist_llm, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace dllm
