"""Uniform batches: decode beside the read floor and cuDNN, the figures of bench/VERSIONS.md.

    python bench/uniform.py

Each figure: a CUDA graph of n calls on n input sets (300 MB together or more), 30 ms of replays
first, the median of 15 replays, in us a call. bf16.
"""

import math
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import leanattn

ops = torch.ops.leanattn
SHAPES = [  # batch, query heads, KV heads, head dim, tokens, cache layout
    (1, 16, 16, 64, 512, "bhsd"), (1, 16, 16, 64, 4096, "bhsd"), (1, 32, 32, 128, 512, "bhsd"),
    (1, 32, 32, 128, 2048, "bhsd"), (1, 32, 32, 128, 8192, "bhsd"), (1, 32, 8, 128, 1024, "bshd"),
    (1, 32, 8, 128, 4096, "bshd"), (1, 32, 8, 128, 32768, "bshd"), (16, 32, 8, 128, 4096, "bshd"),
    (16, 32, 32, 128, 512, "bhsd"), (16, 32, 32, 128, 8192, "bhsd"), (4, 16, 16, 64, 8192, "bshd"),
    (8, 8, 8, 256, 4096, "bshd"), (8, 64, 1, 128, 16384, "bshd"), (8, 32, 2, 128, 8192, "bshd"),
]  # fmt: skip


def microseconds(call, sets):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for inputs in sets:
            call(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for inputs in sets:
            call(*inputs)
    start = time.time()
    while time.time() - start < 0.03:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(sets))
    return sorted(times)[len(times) // 2]


def main():
    leanattn.warmup()
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    counters = leanattn.counters("cuda")
    print("shape MiB floor decode with-counters cuDNN")
    for batch, heads_q, heads_kv, head_dim, tokens, layout in SHAPES:
        size = 2 * batch * tokens * heads_kv * head_dim * 2
        order = (tokens, heads_kv) if layout == "bshd" else (heads_kv, tokens)
        new = dict(dtype=torch.bfloat16, device="cuda")
        sets = [
            (torch.randn(batch, 1, heads_q, head_dim, **new),
             torch.randn(batch, *order, head_dim, **new), torch.randn(batch, *order, head_dim, **new))
            for _ in range(max(2, min(64, math.ceil(300e6 / size))))
        ]  # fmt: skip

        def tokens_first(x, layout=layout):
            return x if layout == "bshd" else x.transpose(1, 2)

        def sdpa(q, k, v):
            k, v = (tokens_first(x).transpose(1, 2) for x in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, enable_gqa=heads_q != heads_kv
            )

        def decode(q, k, v, **options):
            return ops.decode(q, tokens_first(k), tokens_first(v), **options)

        row = [
            microseconds(lambda q, k, v: ops.read_floor(k, v, sink), sets),
            microseconds(decode, sets),
            microseconds(lambda q, k, v: decode(q, k, v, counters=counters), sets),
        ]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            row.append(microseconds(sdpa, sets))
        name = f"b{batch} {heads_q}/{heads_kv} D{head_dim} s{tokens} {layout}"
        print(f"{name} {size >> 20}", *(f"{value:.2f}" for value in row), flush=True)


if __name__ == "__main__":
    main()
