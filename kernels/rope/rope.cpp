// dist_llm::rope on the CPU: q and k in one call; its backward is the same, the other way round. dist_llm/ops/rope.py has
// the reference.
#include "rope/rope.h"

#include <tuple>

#include "tensor.h"

namespace dllm {
namespace {

constexpr const char* kOp = "rope";

void require_table(const Tensor& x, const Tensor& query, const char* name) {
  require_cpu(x, kOp, name);
  const int64_t seq = query.size(1), half = query.size(3) / 2;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 2 && x.size(0) == seq && x.size(1) == half,
                  "dist_llm::rope: ", name, " must be float32 [", seq, ", ", half, "], not ",
                  torch::headeronly::toString(x.scalar_type()), " ", shape_of(x));
}

std::tuple<Tensor, Tensor> rope(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, bool inverse) {
  require_cpu(query, kOp, "query");
  require_cpu(key, kOp, "key");
  const Format format = format_of(query, kOp, "query");
  require_same_format(key, query, kOp, "key and query");
  STD_TORCH_CHECK(query.dim() == 4 && query.size(3) % 2 == 0,
                  "dist_llm::rope: query must be [batch, seq, heads, an even number], not ", shape_of(query));
  bool alike = key.dim() == 4;
  for (int64_t i : {0, 1, 3}) alike = alike && key.size(i) == query.size(i);
  STD_TORCH_CHECK(alike, "dist_llm::rope: key and query must differ in heads alone, not ", shape_of(key), " and ",
                  shape_of(query));
  require_table(cos, query, "cos");
  require_table(sin, query, "sin");
  const Tensor q = torch::stable::contiguous(query), k = torch::stable::contiguous(key), c = torch::stable::contiguous(cos),
               s = torch::stable::contiguous(sin);
  Tensor query_out = empty_dense(q), key_out = empty_dense(k);
  const Rope call{q.const_data_ptr(), k.const_data_ptr(), static_cast<const float*>(c.const_data_ptr()),
                  static_cast<const float*>(s.const_data_ptr()), query_out.mutable_data_ptr(), key_out.mutable_data_ptr(),
                  q.size(1), q.size(2), k.size(2), q.size(3) / 2, inverse ? -1.0f : 1.0f};
  const auto loop = rope_loops().rotate[int(format)];
  torch::stable::parallel_for(0, q.size(0) * q.size(1), grain((call.query_heads + call.key_heads) * 2 * call.half),
                              [&](int64_t first, int64_t last) { loop(call, first, last); });
  return {query_out, key_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dist_llm, m) {
  m.def("rope(Tensor query, Tensor key, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dist_llm, CPU, m) { m.impl("rope", TORCH_BOX(&rope)); }

}  // namespace dllm
