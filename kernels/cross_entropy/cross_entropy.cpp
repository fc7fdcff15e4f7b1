// dist_llm::cross_entropy_statistics and cross_entropy_gradient_ on the CPU. dist_llm/ops/cross_entropy.py has the
// reference.
#include "cross_entropy/cross_entropy.h"

#include <tuple>

#include "tensor.h"

namespace dllm {
namespace {

struct Part {
  Format format;
  int64_t rows;
  VocabularyPart vocabulary;
};

Part part_of(const Tensor& logits, const Tensor& targets, int64_t start, int64_t valid, int64_t ignored, const char* op) {
  require_cpu(logits, op, "logits");
  require_cpu(targets, op, "targets");
  const Format format = format_of(logits, op, "logits");
  STD_TORCH_CHECK(logits.dim() == 2, "dist_llm::", op, ": logits must be [rows, columns], not ", shape_of(logits));
  STD_TORCH_CHECK(logits.is_contiguous(), "dist_llm::", op, ": logits must be contiguous: their gradient is written over them");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 && targets.size(0) == logits.size(0),
                  "dist_llm::", op, ": targets must be int64 [", logits.size(0), "], not ",
                  torch::headeronly::toString(targets.scalar_type()), " ", shape_of(targets));
  const int64_t columns = logits.size(1), within = std::max<int64_t>(0, std::min(valid, columns));
  return {format, logits.size(0), {columns, start, within, ignored}};
}

const float* row_numbers(const Tensor& x, int64_t rows, bool one_is_enough, const char* name) {
  const char* op = "cross_entropy_gradient_";
  require_cpu(x, op, name);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && (x.numel() == rows || (one_is_enough && x.numel() == 1)),
                  "dist_llm::", op, ": ", name, " must be contiguous float32 with a number for each of ", rows,
                  " rows, not ", torch::headeronly::toString(x.scalar_type()), " ", shape_of(x));
  return static_cast<const float*>(x.const_data_ptr());
}

std::tuple<Tensor, Tensor> statistics(const Tensor& logits, const Tensor& targets, int64_t start, int64_t valid, int64_t ignored) {
  const Part part = part_of(logits, targets, start, valid, ignored, "cross_entropy_statistics");
  const Tensor wanted = torch::stable::contiguous(targets);
  Tensor top = empty_fp32(logits, {part.rows}), sums = empty_fp32(logits, {3, part.rows});
  float* sum = static_cast<float*>(sums.mutable_data_ptr());
  const CrossEntropyStatistics call{logits.const_data_ptr(),
                                    static_cast<const int64_t*>(wanted.const_data_ptr()),
                                    static_cast<float*>(top.mutable_data_ptr()),
                                    sum,
                                    sum + part.rows,
                                    sum + 2 * part.rows,
                                    part.vocabulary};
  const auto loop = cross_entropy_loops().statistics[int(part.format)];
  torch::stable::parallel_for(0, part.rows, grain(part.vocabulary.columns),
                              [&](int64_t first, int64_t last) { loop(call, first, last); });
  return {top, sums};
}

void gradient_(const Tensor& logits, const Tensor& targets, const Tensor& grad, const Tensor& top, const Tensor& raised,
               int64_t start, int64_t valid, int64_t size, int64_t ignored, double smoothing, double z_loss) {
  const Part part = part_of(logits, targets, start, valid, ignored, "cross_entropy_gradient_");
  STD_TORCH_CHECK(size >= part.vocabulary.valid, "dist_llm::cross_entropy_gradient_: a vocabulary of ", size,
                  " cannot have a part of ", part.vocabulary.valid);
  const Tensor wanted = torch::stable::contiguous(targets);
  const CrossEntropyGradient call{logits.mutable_data_ptr(),
                                  static_cast<const int64_t*>(wanted.const_data_ptr()),
                                  row_numbers(grad, part.rows, true, "grad"),
                                  row_numbers(top, part.rows, false, "top"),
                                  row_numbers(raised, part.rows, false, "raised"),
                                  grad.numel() == 1 ? 0 : 1,
                                  part.vocabulary,
                                  float(smoothing / double(std::max<int64_t>(1, size))),
                                  float(smoothing),
                                  float(z_loss)};
  const auto loop = cross_entropy_loops().gradient[int(part.format)];
  torch::stable::parallel_for(0, part.rows, grain(part.vocabulary.columns),
                              [&](int64_t first, int64_t last) { loop(call, first, last); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dist_llm, m) {
  m.def(
      "cross_entropy_statistics(Tensor logits, Tensor targets, int start, int valid, int ignored) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, Tensor grad, Tensor top, Tensor raised, int start, "
      "int valid, int size, int ignored, float smoothing, float z_loss) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&statistics));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&gradient_));
}

}  // namespace dllm
