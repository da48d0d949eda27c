#include "value_checks.h"

#include <string_view>
#include <vector>

#include "plan/knobs.h"

namespace leanattn {

bool value_checks_wanted() {
  const std::string_view value = knob("LEANATTN_CHECK");
  return !value.empty() && value != "0";
}

std::vector<int32_t> read_from_host(const int32_t* values, int64_t stride, int n) {
  std::vector<int32_t> copy(n);
  for (int i = 0; i < n; ++i) copy[i] = values[i * stride];
  return copy;
}

namespace {

void check_lengths(const Checker& check, const Problem& p, std::optional<int64_t> max_seqlen_q) {
  for (int seq = 0; p.cache_seqlens && seq < p.batch; ++seq) {
    const int32_t length = p.cache_seqlens[seq * p.cache_seqlens_stride];
    check.require(length >= 0 && length <= max_length(p), "cache_seqlens", "[", seq,
                  "] must be from 0 to the capacity, ", max_length(p), ", got ", length);
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

// The keys that some query of the sequence sees.
KeyRange sequence_keys(const Problem& p, const Sequence& s) {
  if (s.num_queries == 0) return {0, 0};
  const KeyRange first = keys_seen_from(p, s, position_of(s, 0));
  const KeyRange last = keys_seen_from(p, s, position_of(s, s.num_queries - 1));
  return {first.begin, max_of(first.begin, last.end)};
}

// The entries of the block table that are read.
void check_pages(const Checker& check, const DecodeParams& params, const ReadValues& read) {
  const Problem& p = params.problem;
  int query_begin = first_query_row(p);
  for (int seq = 0; params.block_table && seq < p.batch; ++seq) {
    const Sequence sequence = load_sequence(p, seq, query_begin);
    query_begin = next_query_begin(p, sequence);
    const KeyRange keys = sequence_keys(p, sequence);
    if (keys.empty()) continue;
    const int first = keys.begin / params.page_size;
    const int last = (keys.end - 1) / params.page_size;
    const int64_t stride = params.block_table_page_stride;
    const std::vector<int32_t> pages =
        read(block_table_entry(params, seq, first), stride, last - first + 1);
    for (int index = first; index <= last; ++index) {
      const int32_t page = pages[index - first];
      check.require(page >= 0 && page < params.num_pages, "block_table", "[", seq, ", ", index,
                    "] must be from 0 to num_pages - 1, ", params.num_pages - 1, ", got ", page);
    }
  }
}

}  // namespace

void check_decode_values(const Checker& check, const DecodeParams& params,
                         std::optional<int64_t> max_seqlen_q, const AppendParams* append,
                         const ReadValues& read) {
  const Problem& problem = params.problem;
  DecodeParams params_on_host = params;
  Problem& on_host = params_on_host.problem;
  std::vector<int32_t> lengths, queries;
  if (problem.cache_seqlens) {
    lengths = read(problem.cache_seqlens, problem.cache_seqlens_stride, problem.batch);
    on_host.cache_seqlens = lengths.data();
    on_host.cache_seqlens_stride = 1;
  }
  if (problem.cu_seqlens_q) {
    queries = read(problem.cu_seqlens_q, problem.cu_seqlens_q_stride, problem.batch + 1);
    on_host.cu_seqlens_q = queries.data();
    on_host.cu_seqlens_q_stride = 1;
  }
  for (int seq = 0; append && seq < problem.batch; ++seq) {
    lengths[seq] += append->cu_seqlens ? queries[seq + 1] - queries[seq] : int{append->seqlen_new};
  }
  check_lengths(check, on_host, max_seqlen_q);
  check_pages(check, params_on_host, read);
}

}  // namespace leanattn
