#include "append_value_checks.h"

namespace leanattn {
namespace {

void check_pages(const Checker& check, const AppendParams& p, const ReadValues& read, int seq,
                 int begin, int end) {
  const int first = begin / p.page_size;
  const int64_t offset = seq * p.block_table_batch_stride + first * p.block_table_page_stride;
  const std::vector<int32_t> pages =
      read(p.block_table + offset, p.block_table_page_stride, (end - 1) / p.page_size - first + 1);
  for (size_t i = 0; i < pages.size(); ++i) {
    check.require(pages[i] >= 0 && pages[i] < p.num_pages, "block_table", "[", seq, ", ", first + i,
                  "] must be from 0 to the last page, ", p.num_pages - 1, ", got ", pages[i]);
  }
}

}  // namespace

void check_append_values(const Checker& check, const AppendParams& p, const ReadValues& read) {
  const std::vector<int32_t> lengths = read(p.cache_seqlens, p.cache_seqlens_stride, p.batch);
  std::vector<int32_t> bounds;
  if (p.cu_seqlens) bounds = read(p.cu_seqlens, p.cu_seqlens_stride, p.batch + 1);
  for (size_t i = 0; i < bounds.size(); ++i) {
    const int32_t previous = i == 0 ? 0 : bounds[i - 1];
    check.require(bounds[i] >= previous && bounds[i] <= p.num_tokens, "cu_seqlens", "[", i,
                  "] must be from the entry before, ", previous, ", to the number of new tokens, ",
                  p.num_tokens, ", got ", bounds[i]);
  }
  for (int seq = 0; seq < p.batch; ++seq) {
    const int length = lengths[seq];
    const int added = p.cu_seqlens ? bounds[seq + 1] - bounds[seq] : int{p.seqlen_new};
    check.require(length >= 0 && length <= max_length(p) - added, "cache_seqlens", "[", seq,
                  "] must be from 0 to the capacity, ", max_length(p), ", less the new tokens, ",
                  added, ", got ", length);
    if (added == 0) continue;
    check.require(p.rope.num_pairs == 0 || length + added <= p.rope.max_position, "cache_seqlens",
                  "[", seq, "] must be at most the positions of cos and sin, ", p.rope.max_position,
                  ", less the new tokens, ", added, ", got ", length);
    if (!p.block_table) continue;
    const KeyRange tokens{length, length + added};
    const KeyRange keys = p.shard.is_whole() ? tokens : p.shard.keys_of(tokens);
    if (!keys.empty()) check_pages(check, p, read, seq, keys.begin, keys.end);
  }
}

}  // namespace leanattn
