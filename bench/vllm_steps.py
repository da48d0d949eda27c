"""What a layer's attention costs in vLLM's steps, by leanattn's backend and by FlashAttention's.

    python -m bench.vllm_steps [--out FILE]

Needs vLLM and a GPU, and no model: the two backends' own builders and implementations are given the
same metadata and caches, as vLLM lays them out. Decode steps are replayed from a CUDA graph of
LAYERS layers, each with a cache of its own; steps with a prefill run eagerly, as by vLLM's default.
Medians, us a layer. `one call` is leanattn's ragged call for the whole batch, `split` its decodes
beside FlashAttention's prefill. `FULL` is a graph of cudagraph_mode FULL, which leanattn captures
for any step.
"""

import argparse
import csv
import statistics
import sys
import types

import torch
import vllm
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import utils
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

import leanattn
from leanattn.integrations.vllm_attention import LeanAttentionBackend

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
LAYERS = 8
# Sequences, their tokens, tokens a block, queries a sequence.
DECODES = [
    (1, 2048, 16, 1), (8, 4096, 16, 1), (32, 2048, 16, 1), (128, 1024, 16, 1), (32, 2048, 64, 1),
    (32, 2048, 16, 4),
]  # fmt: skip
# The tokens of sequences that decode, and those of one prefill beside them.
ALIKE = [4096] * 32
RAGGED = [1024, 1536, 2048, 4096, 8192, 16384, 32768, 65536]
MIXED = [(ALIKE, 16), (ALIKE, 256), (ALIKE, 4096), (RAGGED, 16), (RAGGED, 256), (RAGGED, 4096)]


def make_config(mode):
    names = types.SimpleNamespace
    return names(
        model_config=names(
            rswa_window=None, use_mla=False, dtype=torch.bfloat16,
            get_num_attention_heads=lambda parallel: HEADS,
            get_num_kv_heads=lambda parallel: KV_HEADS, get_head_size=lambda: HEAD_SIZE,
        ),
        cache_config=names(cache_dtype="auto"),
        speculative_config=None,
        attention_config=names(
            flash_attn_version=None, flash_attn_max_num_splits_for_cuda_graph=32,
        ),
        parallel_config=names(
            decode_context_parallel_size=1, prefill_context_parallel_size=1,
            dcp_comm_backend="ag_rs", cp_kv_cache_interleave_size=1,
        ),
        scheduler_config=names(max_num_seqs=256, max_num_batched_tokens=8192),
        compilation_config=names(
            cudagraph_mode=mode, max_cudagraph_capture_size=512,
            static_forward_context={},
        ),
    )  # fmt: skip


class Stack:
    """LAYERS layers of one backend."""

    def __init__(self, backend, caches, block_size, mode=CUDAGraphMode.FULL_AND_PIECEWISE):
        config = make_config(mode)
        scale = torch.ones((), device="cuda")
        with torch.device("cuda"), set_current_vllm_config(config):
            impl = backend.get_impl_cls()(
                HEADS, HEAD_SIZE, HEAD_SIZE**-0.5, KV_HEADS, None, None, "auto"
            )
            self.layer = types.SimpleNamespace(
                impl=impl, _q_scale=scale, _k_scale=scale, _v_scale=scale
            )
            config.compilation_config.static_forward_context["layer"] = self.layer
            spec = types.SimpleNamespace(
                block_size=block_size, dtype=torch.bfloat16, sliding_window=None
            )
            self.builder = backend.get_builder_cls()(spec, ["layer"], config, torch.device("cuda"))
        self.caches = caches

    def forward(self, query, output, metadata):
        for cache in self.caches:
            self.layer.impl.forward(self.layer, query, None, None, cache, metadata, output=output)


def make_caches(num_blocks, block_size, layout):
    utils.set_kv_cache_layout(layout)
    order = LeanAttentionBackend.get_kv_cache_stride_order()
    shape = LeanAttentionBackend.get_kv_cache_shape(num_blocks, block_size, KV_HEADS, HEAD_SIZE)
    back = [order.index(i) for i in range(4)]
    return [
        torch.randn([shape[i] for i in order], device="cuda").bfloat16().permute(*back)
        for _ in range(LAYERS)
    ]


def make_step(query_lens, lengths, block_size):
    """The metadata of a step, the sequences' blocks in any order; and how many blocks there are."""
    width = -(-max(lengths) // block_size)
    num_blocks = sum(-(-length // block_size) for length in lengths)
    blocks = torch.randperm(num_blocks, dtype=torch.int32)
    table = torch.zeros(len(lengths), width, dtype=torch.int32)
    for row, length in zip(table, lengths):
        own, blocks = blocks[: -(-length // block_size)], blocks[-(-length // block_size) :]
        row[: len(own)] = own
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    lens = torch.tensor(lengths, dtype=torch.int32)
    total = sum(query_lens)
    step = CommonAttentionMetadata(
        query_start_loc=starts.cuda(), query_start_loc_cpu=starts, seq_lens=lens.cuda(),
        seq_lens_cpu_upper_bound=lens, num_reqs=len(lengths), num_actual_tokens=total,
        max_query_len=max(query_lens), max_seq_len=max(lengths),
        block_table_tensor=table.cuda(), slot_mapping=torch.full((total,), -1).cuda(),
    )  # fmt: skip
    return step, num_blocks


def median_us(run, repeats=20):
    """A layer's share of run, us."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / LAYERS)
    return statistics.median(times)


def in_graph(run):
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def make_tensors(tokens):
    query = torch.randn(tokens, HEADS, HEAD_SIZE, device="cuda").bfloat16()
    return query, torch.empty_like(query)


def measure_decodes():
    for batch, context, block_size, queries in DECODES:
        step, num_blocks = make_step([queries] * batch, [context] * batch, block_size)
        query, output = make_tensors(batch * queries)
        row = {"step": f"{batch} x {queries} queries on {context} tokens, blocks of {block_size}"}

        def measure(name, *stack_options):
            stack = Stack(*stack_options)
            metadata = stack.builder.build_for_cudagraph_capture(step)
            replay = in_graph(lambda: stack.forward(query, output, metadata))
            row[name] = median_us(replay)

        for layout in ("HND", "NHD"):
            caches = make_caches(num_blocks, block_size, layout)
            measure(f"leanattn {layout}", LeanAttentionBackend, caches, block_size)
            measure(f"FA {layout}", FlashAttentionBackend, caches, block_size)
        measure("leanattn FULL", LeanAttentionBackend, caches, block_size, CUDAGraphMode.FULL)
        yield row


def measure_mixed():
    for lengths, tokens in MIXED:
        batch = len(lengths)
        step, num_blocks = make_step([1] * batch + [tokens], [*lengths, tokens], 16)
        query, output = make_tensors(batch + tokens)
        caches = make_caches(num_blocks, 16, "NHD")
        name = f"{min(lengths)} to {max(lengths)}" if len(set(lengths)) > 1 else lengths[0]
        row = {"step": f"{batch} queries on {name} tokens and a prefill of {tokens}"}
        stack = Stack(LeanAttentionBackend, caches, 16)
        metadata = stack.builder.build(0, step)
        assert metadata.prefill is not None
        row["split"] = median_us(lambda: stack.forward(query, output, metadata))
        expected = output.float()
        stack.layer.impl.flash = None
        metadata = stack.builder.build(0, step)
        row["one call"] = median_us(lambda: stack.forward(query, output, metadata))
        row["difference"] = (output.float() - expected).abs().max().item()
        stack = Stack(FlashAttentionBackend, caches, 16)
        metadata = stack.builder.build(0, step)
        row["FA"] = median_us(lambda: stack.forward(query, output, metadata))
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="a CSV file to write, too")
    out = parser.parse_args().out
    torch.manual_seed(0)
    about = {
        "command": f"python -m bench.vllm_steps {' '.join(sys.argv[1:])}".strip(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "leanattn": leanattn.__version__,
    }
    print(about)
    rows = []
    for measure in (measure_decodes, measure_mixed):
        for row in measure():
            row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            print(row, flush=True)
            rows.append(row)
    if out:
        with open(out, "w", newline="") as file:
            file.writelines(f"# {name}: {value}\n" for name, value in about.items())
            columns = list(dict.fromkeys(k for row in rows for k in row))
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
