"""What one eager call costs beside the kernel: time of the CPU, memory, and torch.compile.

    python -m bench.host_time

Small shapes and CUDA, so that the GPU is never the bottleneck. Beside it torch.mul and SDPA on the
same machine, for an idea of its speed. Autograd's kernel for the missing backward runs in Python;
it is skipped under torch.inference_mode, hence three columns.
"""

import argparse
import statistics
import sys
import time

import torch

import leanattn
from bench import timing
from bench.provenance import provenance

CALLS = 300
REPEATS = 30
MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.host_time", description="Host time and memory of one eager call."
    )
    parser.add_argument("--commit", help="where there is no git")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("bench.host_time: torch sees no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    for key, value in provenance(device, options.commit).items():
        print(f"{key}: {value}")
    leanattn.warmup(device)
    calls = _calls(device)
    print("\nHost time, us a call")
    print(f"{'':36}", *(f"{mode.__name__:>15}" for mode in MODES))
    for name, call in calls.items():
        row = []
        for mode in MODES:
            with mode():
                row.append(host_microseconds(call))
        print(f"{name:36}", *(f"{value:15.2f}" for value in row), flush=True)
    print("\nMemory, bytes a call: allocated for good (its result), and at most on the way")
    for name, call in calls.items():
        kept, peak = memory_of(call)
        print(f"{name:36} {kept:15} {peak:15}")
    _kernel_times(device)
    return 0


def _calls(device):
    decode = torch.ops.leanattn.decode
    q, k, v = _tensors(device, batch=1, tokens=512)
    lengths = torch.tensor([512], dtype=torch.int32, device=device)
    counters = leanattn.counters(device)
    x = torch.randn(4, device=device)
    transposed = [t.transpose(1, 2) for t in (q, k, v)]
    out = torch.empty_like(q)
    return {
        "torch.mul": lambda: torch.mul(x, x),
        "SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(*transposed),
        "decode": lambda: decode(q, k, v),
        "decode, lengths and counters": lambda: decode(q, k, v, lengths, counters=counters),
        "decode_out, lengths and counters": lambda: torch.ops.leanattn.decode_out(
            q, k, v, lengths, counters=counters, out=out
        ),
        "leanattn.decode, lengths, counters": lambda: leanattn.decode(
            q, k, v, lengths, counters=counters
        ),
    }


def _tensors(device, batch, tokens):
    """q `[B, 1, 16, 64]`, k and v `[B, S, 16, 64]`"""

    def new(rows):
        return torch.randn(batch, rows, 16, 64, dtype=torch.bfloat16, device=device)

    return new(1), new(tokens), new(tokens)


def host_microseconds(call):
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def memory_of(call):
    """(bytes that a call's result keeps, bytes allocated at most while it runs)"""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del result
    return kept, torch.cuda.max_memory_allocated() - before


def _kernel_times(device):
    """A function around decode: as it is, through torch.compile, and that with CUDA graphs."""
    counters = leanattn.counters(device)
    q, k, v = _tensors(device, batch=4, tokens=4096)
    lengths = torch.tensor([4096, 17, 3000, 1024], dtype=torch.int32, device=device)

    def step(q, k, v):
        return torch.ops.leanattn.decode(q * 2, k, v, lengths, counters=counters) + 1

    variants = {
        "eager": step,
        "torch.compile": torch.compile(step, fullgraph=True),
        "torch.compile, reduce-overhead": torch.compile(
            step, fullgraph=True, mode="reduce-overhead"
        ),
    }
    print("\ndecode between two pointwise ops, us a step by the wall clock (inference_mode)")
    with torch.inference_mode():
        expected = step(q, k, v)
        for name, function in variants.items():
            try:
                for _ in range(3):  # the third call of reduce-overhead replays its graph
                    out = function(q, k, v)
            except Exception as error:  # whatever the compiler raises is the result
                print(f"{name:36} fails: {str(error).splitlines()[0]}", flush=True)
                continue
            same = torch.equal(out, expected) or (out - expected).abs().max().item()
            us = timing.step_microseconds(lambda _: function(q, k, v), [None], device, 0.05)
            note = "" if same is True else f"   differs by {same:.1e}"
            print(f"{name:36} {us:15.2f}{note}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
