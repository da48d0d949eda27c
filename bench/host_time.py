"""Host time of one eager call: what the CPU spends until the kernel is launched.

    python bench/host_time.py

Small shapes and CUDA, so that the GPU is never the bottleneck. Beside it torch.mul and SDPA on the
same machine, for an idea of its speed. Autograd's kernel for the missing backward runs in Python; it
is skipped under torch.inference_mode, hence the three rows.
"""

import statistics
import time

import torch

import leanattn

CALLS = 300
REPEATS = 30


def microseconds(call):
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def main():
    decode = torch.ops.leanattn.decode
    q = torch.randn(1, 1, 16, 64, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(1, 512, 16, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    lengths = torch.tensor([512], dtype=torch.int32, device="cuda")
    counters = leanattn.counters("cuda")
    x = torch.randn(4, device="cuda")
    transposed = [t.transpose(1, 2) for t in (q, k, v)]
    calls = {
        "torch.mul": lambda: torch.mul(x, x),
        "SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(*transposed),
        "decode": lambda: decode(q, k, v),
        "decode, lengths and counters": lambda: decode(q, k, v, lengths, counters=counters),
    }
    print(
        torch.cuda.get_device_name(), "torch", torch.__version__, "leanattn", leanattn.__version__
    )
    modes = (torch.enable_grad, torch.no_grad, torch.inference_mode)
    print(f"{'us a call':30}", *(f"{mode.__name__:>15}" for mode in modes))
    for name, call in calls.items():
        row = []
        for mode in modes:
            with mode():
                row.append(microseconds(call))
        print(f"{name:30}", *(f"{value:15.2f}" for value in row))


if __name__ == "__main__":
    main()
