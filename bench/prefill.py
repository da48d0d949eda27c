"""Times leanattn.flash_attn's functions on prefills beside the backends of torch's SDPA.

    python -m bench.prefill --csv prefill.csv

The shapes are those of ONNX Runtime's benchmark of FlashAttention-2, in the three formats that its
operators take: Q, K and V; Q and packed KV; packed QKV. A prefill is computed by torch, so what is
measured is what the formats cost: each backend alone gets separate contiguous `[B, H, S, D]`
tensors. bench/README.md has the columns.
"""

import argparse
import csv
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import leanattn
from bench import timing
from bench.data import TOLERANCE
from bench.implementations import reason_of
from bench.provenance import provenance
from leanattn.demo.info import device_argument

FORMATS = ("q, k, v", "q, kv", "qkv")
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
COLUMNS = ["shape", "implementation", "us", "us_quartile1", "us_quartile3", "tflops", "reason"]


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    heads: int
    head_dim: int
    causal: bool

    @property
    def name(self):
        causal = " causal" * self.causal
        return f"b{self.batch} s{self.tokens} {self.heads} x {self.head_dim}{causal}"

    @property
    def flops(self):
        """Of both products, of which a causal mask leaves half."""
        pairs = self.tokens**2 // (2 if self.causal else 1)
        return 4 * self.batch * self.heads * pairs * self.head_dim


def prefill(causal):
    """ONNX Runtime's grid: models of language, of images, BERT, TNLG."""
    sizes = [
        *((32 >> i, 512 << i, *heads) for i in range(6) for heads in ((32, 64), (16, 128))),
        *((b, s, 8, d) for b, s in ((1, 4096), (4, 4096), (1, 16384)) for d in (40, 80, 160)),
        *((b, s, 12, 64) for s in (128, 384, 512) for b in (64, 128)),
        *((b, s, 32, 128) for b in (4, 8) for s in (2048, 4096)),
    ]
    return [Shape(*size, causal) for size in sizes]


def tiny(causal):
    return [Shape(2, 40, 2, 16, causal), Shape(1, 33, 3, 20, causal)]


SETS = {"prefill": prefill, "tiny": tiny}


def main(arguments=None):
    options = _parse(arguments)
    header = provenance(options.device, options.commit)
    for key, value in header.items():
        print(f"{key}: {value}")
    rows = []
    for shape in SETS[options.set](options.causal):
        if options.shape in shape.name:
            rows += measure(shape, options.device)
            print_shape(shape, [row for row in rows if row["shape"] == shape.name])
    if options.csv:
        write(options.csv, header, rows)
    print_summary(rows)
    return 0 if rows else 1


def _parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m bench.prefill", description=__doc__)
    parser.add_argument("--set", choices=SETS, default="prefill")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--shape", default="", metavar="TEXT", help="only shapes named so")
    parser.add_argument("--device", type=device_argument, default="cuda")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--commit", help="for the header where there is no git")
    options = parser.parse_args(arguments)
    if options.device.type == "cpu" and options.set != "tiny":
        parser.error("--device cpu is to try the bench: it takes --set tiny alone")
    return options


def measure(shape, device):
    """Rows of COLUMNS, one for each format and backend."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    size = (shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
    qkv = torch.randn(size, device=device, dtype=dtype)
    truth = _truth(shape, qkv)
    prepared, rows = {}, []
    for name, call in _calls(shape, qkv).items():
        try:
            out = call(None)
            error = ((out[0, :, 0].float() - truth).norm() / truth.norm()).item()
            assert error < TOLERANCE, f"wrong: off by {error:.2g} of the norm"
        except Exception as refusal:  # whatever a backend raises is its reason
            row = dict.fromkeys(COLUMNS)
            row |= dict(shape=shape.name, implementation=name, reason=reason_of(refusal))
            rows.append(row)
        else:
            prepared[name] = call
    if device.type == "cuda":
        times = timing.graph_times(
            {name: timing.CudaGraph(call, [None]) for name, call in prepared.items()}
        )
    else:
        times = timing.cpu_times(prepared, [None])
    for name, time in times.items():
        rows.append(
            dict(
                shape=shape.name, implementation=name, us=time.median, reason=None,
                us_quartile1=time.quartile1, us_quartile3=time.quartile3,
                tflops=shape.flops / time.median * 1e-6,
            )
        )  # fmt: skip
    return rows


def _calls(shape, qkv):
    """{name: call(inputs)}, each giving `[B, S, H, D]`."""
    options = dict(causal=shape.causal)
    q, kv = qkv[:, :, 0].contiguous(), qkv[:, :, 1:].contiguous()
    q_alone, k_alone, v_alone = (x.contiguous() for x in qkv.unbind(2))
    calls = {
        "q, k, v": lambda _: leanattn.flash_attn_func(q_alone, k_alone, v_alone, **options),
        "q, kv": lambda _: leanattn.flash_attn_kvpacked_func(q, kv, **options),
        "qkv": lambda _: leanattn.flash_attn_qkvpacked_func(qkv, **options),
    }
    heads_first = [x.transpose(1, 2).contiguous() for x in qkv.unbind(2)]
    for name, backend in BACKENDS.items():

        def call(_, backend=backend):
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(*heads_first, is_causal=shape.causal)
            return out.transpose(1, 2)

        calls[name] = call
    return calls


def _truth(shape, qkv):
    """`[S, D]` fp32, of the first sequence's first head."""
    q, k, v = qkv[0, :, :, 0].float().unbind(1)
    scores = q @ k.T * shape.head_dim**-0.5
    if shape.causal:
        scores += torch.full_like(scores, -torch.inf).triu(1)
    return scores.softmax(-1) @ v


def print_shape(shape, rows):
    rates = (
        f"{row['implementation']} {row['tflops']:.1f}"
        if row["us"]
        else row["implementation"] + " -"
        for row in rows
    )
    print(f"{shape.name:28s} TFLOP/s: " + " | ".join(rates))


def formats_cost(rows):
    """{format: [time over that of the fastest backend alone, shape by shape]}"""
    costs = {name: [] for name in FORMATS}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        times = {r["implementation"]: r["us"] for r in rows if r["shape"] == shape and r["us"]}
        alone = [times[name] for name in BACKENDS if name in times]
        for name in FORMATS:
            if alone and name in times:
                costs[name].append(times[name] / min(alone))
    return costs


def print_summary(rows):
    for row in {r["implementation"]: r for r in rows if r["reason"]}.values():
        print(f"{row['implementation']}, {row['shape']}: {row['reason']}")
    for name, costs in formats_cost(rows).items():
        if costs:
            print(
                f"{name}: {statistics.geometric_mean(costs):.3f} of the fastest backend's time on "
                f"[B, H, S, D], {max(costs):.3f} at most, {len(costs)} shapes"
            )


def write(path, header, rows):
    with open(path, "w", newline="") as file:
        for key, value in header.items():
            file.write(f"# {key}: {value}\n")
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    sys.exit(main())
