#include "value_checks.h"

#include <cstdlib>
#include <string>
#include <vector>

#ifdef LEANATTN_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace leanattn {

bool value_checks_wanted() {
  const char* value = std::getenv("LEANATTN_CHECK");
  return value && *value && std::string(value) != "0";
}

void check_values(const Checker& check, const Problem& p, std::optional<int64_t> max_seqlen_q) {
  if (!value_checks_wanted()) return;
  for (int seq = 0; p.cache_seqlens && seq < p.batch; ++seq) {
    const int32_t length = p.cache_seqlens[seq * p.cache_seqlens_stride];
    check.require(length >= 0 && length <= p.capacity, "cache_seqlens", "[", seq,
                  "] must be from 0 to the capacity, ", p.capacity, ", got ", length);
  }
  int32_t previous = 0;
  for (int i = 0; p.cu_seqlens_q && i <= p.batch; ++i) {
    const int32_t entry = p.cu_seqlens_q[i * p.cu_seqlens_q_stride];
    check.require(entry >= previous && entry <= p.total_q, "cu_seqlens_q", "[", i,
                  "] must be from the entry before, ", previous, ", to total_q, ", p.total_q,
                  ", got ", entry);
    check.require(i == 0 || !max_seqlen_q || entry - previous <= *max_seqlen_q, "max_seqlen_q",
                  "must be at least the longest query, ", entry - previous, ", got ",
                  max_seqlen_q.value_or(0));
    previous = entry;
  }
}

#ifdef LEANATTN_WITH_CUDA
void check_values_on_device(const Checker& check, const Problem& problem,
                            std::optional<int64_t> max_seqlen_q, cudaStream_t stream) {
  if (is_capturing(stream)) return;
  Problem on_host = problem;
  std::vector<int32_t> lengths, queries;
  if (problem.cache_seqlens) {
    lengths = copy_to_host(problem.cache_seqlens, problem.cache_seqlens_stride, problem.batch,
                           stream);
    on_host.cache_seqlens = lengths.data();
    on_host.cache_seqlens_stride = 1;
  }
  if (problem.cu_seqlens_q) {
    queries = copy_to_host(problem.cu_seqlens_q, problem.cu_seqlens_q_stride, problem.batch + 1,
                           stream);
    on_host.cu_seqlens_q = queries.data();
    on_host.cu_seqlens_q_stride = 1;
  }
  check_values(check, on_host, max_seqlen_q);
}
#endif

}  // namespace leanattn
