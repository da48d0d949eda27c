"""vLLM's decode context parallelism: each rank of a group has every few tokens of a sequence.

The context, which is what was there before the step, is attended by the queries of all ranks'
heads, on each rank over what it has of it; vLLM combines that over the ranks. The step's new tokens
are on every rank, and attended among themselves. The two merge by their log-sum-exps.
"""

import dataclasses

import torch
from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens

import leanattn.ops  # noqa: F401  registers torch.ops.leanattn

_decode_with_lse = torch.ops.leanattn.decode_with_lse


@dataclasses.dataclass
class ContextMetadata:
    parallel: "ContextParallel"
    seq_lens: (
        torch.Tensor | None
    )  # [num_seqs] int32, this rank's part of the context; None: no rank
    # has any. Where sequences have different numbers of queries:
    new_lens: torch.Tensor | None = None  # [num_seqs] int32, how many each has
    new_tokens: torch.Tensor | None = None  # [num_seqs, n] int32, which tokens of the step they are

    def attend(self, query, key, value, k_cache, v_cache, output, metadata, options):
        """Writes a step's attention to output, `[num_tokens, Hq, D]`."""
        m = metadata
        sinks = options.pop("sinks")  # one more logit a head, so in one of the two parts alone
        scales = {name: options.pop(name, None) for name in ("k_scale", "v_scale")}
        new_out, new_lse = self._new_tokens(query, key, value, m, dict(options, sinks=sinks))
        if self.seq_lens is None:
            output.copy_(new_out)
            return
        queries = self.parallel.group.all_gather(query.contiguous(), dim=1)
        context = self._whole(
            queries, k_cache, v_cache, self.seq_lens, m.block_table, m, {**options, **scales}
        )
        out, lse = self.parallel.combine(*context, self.parallel.group, return_lse=True)
        merged, _ = torch.ops.leanattn.merge_states(
            torch.stack((out, new_out)), torch.stack((lse, new_lse))
        )
        output.copy_(merged)

    def _new_tokens(self, query, key, value, m, options):
        if m.query_len is None:
            # The step's tokens as pages of one token.
            pages = key.unsqueeze(1), value.unsqueeze(1)
            return _decode_with_lse(
                query, *pages, self.new_lens, self.new_tokens, cu_seqlens_q=m.query_start_loc,
                **options,
            )  # fmt: skip
        query, key, value = (x.unflatten(0, (m.num_seqs, m.query_len)) for x in (query, key, value))
        return _flat(_decode_with_lse(query, key, value, **options))

    def _whole(self, query, k_cache, v_cache, seq_lens, block_table, m, options):
        """Every query over all of seq_lens."""
        options["causal"] = False
        arguments = k_cache, v_cache, seq_lens, block_table
        if m.query_len is None:
            return _decode_with_lse(query, *arguments, cu_seqlens_q=m.query_start_loc, **options)
        query = query.unflatten(0, (m.num_seqs, m.query_len))
        return _flat(_decode_with_lse(query, *arguments, **options))


def _flat(states):
    return tuple(x.flatten(0, 1) for x in states)


class ContextParallel:
    """A builder's part: the lengths that a graph reads stay where they are, and each step's `build`
    writes them anew."""

    @classmethod
    def of_group(cls, vllm_config, device):
        """For vLLM's group of this process; None where there is none, or one of a single rank."""
        from vllm.distributed.parallel_state import get_dcp_group

        try:
            group = get_dcp_group()
        except AssertionError:  # as in vLLM's own backends: not set up in tests
            return None
        return cls(group, vllm_config, device) if group.world_size > 1 else None

    def __init__(self, group, vllm_config, device):
        from vllm.v1.attention.ops.common import cp_lse_ag_out_rs
        from vllm.v1.attention.ops.dcp_alltoall import dcp_a2a_lse_reduce

        self.group = group
        parallel_config = vllm_config.parallel_config
        all_to_all = parallel_config.dcp_comm_backend == "a2a"
        self.combine = dcp_a2a_lse_reduce if all_to_all else cp_lse_ag_out_rs
        self._interleave = parallel_config.cp_kv_cache_interleave_size
        sequences = vllm_config.scheduler_config.max_num_seqs
        graph_tokens = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        sequences = max(sequences, graph_tokens)
        self._seq_lens, self._new_lens = torch.zeros(
            2, sequences, dtype=torch.int32, device=device
        ).unbind()
        self._new_tokens = torch.zeros(sequences, graph_tokens, dtype=torch.int32, device=device)

    def build(self, common_metadata, metadata, capturing):
        """Of the step's sequences.

        capturing: the context counts as there, and the tokens of any sequence may be all of them.
        """
        m, n = common_metadata, metadata.num_seqs
        starts = metadata.query_start_loc
        lens = starts.diff()
        new_lens, seq_lens = self._new_lens[:n], self._seq_lens[:n]
        new_lens.copy_(lens)
        seq_lens.copy_(
            get_dcp_local_seq_lens(
                (metadata.seq_lens - lens).clamp(min=0), self.group.world_size,
                self.group.rank_in_group, self._interleave,
            )
        )  # fmt: skip
        has_context = capturing or _has_context(m)
        in_graph = m.num_actual_tokens <= self._new_tokens.shape[1]
        if in_graph:
            new_tokens = self._new_tokens[:n]
        else:
            new_tokens = starts.new_empty(n, m.max_query_len)
        if in_graph or metadata.query_len is None:
            places = torch.arange(new_tokens.shape[1], dtype=torch.int32, device=starts.device)
            torch.add(starts[:-1, None], places, out=new_tokens)
        return ContextMetadata(self, seq_lens if has_context else None, new_lens, new_tokens)


def _has_context(m):
    """Whether any sequence has tokens from before this step, as far as the host knows. Asked of
    numbers that all ranks share, as all of them have to take the same way."""
    if m.seq_lens_cpu_upper_bound is None:
        return True
    query_lens = m.query_start_loc_cpu[: m.num_reqs + 1].diff()
    return bool((m.seq_lens_cpu_upper_bound[: m.num_reqs] > query_lens).any())
