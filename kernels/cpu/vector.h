// Number formats and branch-free arithmetic for the loops of a CPU. Included once for each instruction set, so all of
// it lives in that set's own namespace: an inline function that the linker merged could hold instructions that an older
// processor lacks. For the same reason neither torch nor the standard library's templates may be included here.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef DLLM_ISA
#error "a file of loops is compiled with -DDLLM_ISA=base, avx2 or avx512"
#endif

#define DLLM_PASTE_(a, b) a##_##b
#define DLLM_PASTE(a, b) DLLM_PASTE_(a, b)
// The name that the table of an op's loops has in this instruction set: DLLM_TABLE(rms_norm) is rms_norm_avx2.
#define DLLM_TABLE(op) DLLM_PASTE(op, DLLM_ISA)
#define DLLM_SIMD _Pragma("omp simd")

namespace dllm {
namespace DLLM_ISA {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float load(const float* from, int64_t i) { return from[i]; }
inline void store(float* to, int64_t i, float value) { to[i] = value; }

inline float load(const BFloat16* from, int64_t i) { return as_float(uint32_t(from[i].bits) << 16); }

// Round to nearest, ties to even; a NaN stays one.
inline void store(BFloat16* to, int64_t i, float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to[i].bits = uint16_t(value == value ? rounded : 0x7fc0u);
}

// The bits of a half, moved into a float, are that number times 2^-112, subnormals too.
inline float load(const Float16* from, int64_t i) {
  const uint32_t half = from[i].bits;
  const float value = as_float((half & 0x7fffu) << 13) * as_float(239u << 23);
  const uint32_t wide = as_bits(value);
  const uint32_t finite = (half & 0x7c00u) == 0x7c00u ? (wide | 0x7f800000u) : wide;
  return as_float(finite | ((half & 0x8000u) << 16));
}

// Adding and taking away 2^13 times the power of two below the number leaves the ten bits that a half has; of numbers
// below 2^-14 it leaves the multiples of 2^-24.
inline void store(Float16* to, int64_t i, float value) {
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu, power = magnitude & 0x7f800000u;
  const float ruler = as_float((power < (113u << 23) ? (113u << 23) : power) + (13u << 23));
  const float rounded = (as_float(magnitude) + ruler) - ruler;
  uint32_t half = as_bits(rounded * as_float(15u << 23)) >> 13;
  half = rounded >= 65536.0f ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to[i].bits = uint16_t(half | ((bits >> 16) & 0x8000u));
}

// What a number is after it was stored: statistics must be those of what later reads find.
template <class T>
inline float rounded_as(float value) {
  T kept[1];
  store(kept, 0, value);
  return load(kept, 0);
}

// exp by 2^n times a Taylor polynomial on |r| <= ln(2) / 2, within 2 units in the last place; beyond what a float
// holds it is the least or greatest normal one. A NaN comes out as a number: who sums these must see it elsewhere.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return as_float(as_bits(p) + (as_bits(shifted) << 23));
}

// The sum over i of f(i), in four parts of the row: one running sum would wait for itself at every addition.
template <class F>
inline __attribute__((always_inline)) float sum_over(int64_t n, F f) {
  const int64_t part = n / 4;
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
  _Pragma("omp simd reduction(+ : a, b, c, d)") for (int64_t i = 0; i < part; ++i) {
    a += f(i);
    b += f(i + part);
    c += f(i + 2 * part);
    d += f(i + 3 * part);
  }
  for (int64_t i = 4 * part; i < n; ++i) a += f(i);
  return (a + b) + (c + d);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace
}  // namespace DLLM_ISA
}  // namespace dllm
