"""What a call costs the host, us, on an emulated GPU whose kernels are left out.

python tests/emulator/host_time.py: everything up to a launch is leanattn's own code; what the CUDA
driver takes for the launch and for tensor maps is not in it.
"""

import os
import sys
import tempfile
import timeit
from pathlib import Path

os.environ["EMULATED_GPU_IDLE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

from emulator.gpu import EmulatedGpu

EmulatedGpu(tempfile.gettempdir())

import torch  # noqa: E402
from cases import make_case  # noqa: E402  leanattn must find the emulated GPU

import leanattn  # noqa: E402


def time(call):
    return min(timeit.repeat(call, number=2000, repeat=15)) / 2000 * 1e6


@torch.inference_mode()
def main():
    torch.set_num_threads(1)
    case = make_case(
        "cpu", torch.bfloat16, heads=(32, 8), dims=(128, 128), lengths=(17, 256, 30, 4)
    )
    uniform = {name: tensor for name, tensor in case.items() if name != "cache_seqlens"}
    counters = leanattn.counters("cpu", 1024)
    decode = torch.ops.leanattn.decode
    for name, call in {
        "torch.mul": lambda: torch.mul(counters, counters),
        "decode": lambda: decode(**case),
        "decode, with counters": lambda: decode(**case, counters=counters),
        "decode, without lengths": lambda: decode(**uniform),
        "its checks alone": lambda: torch.ops.leanattn.decode_check(**case),
    }.items():
        print(f"{name:<24}{time(call):6.2f}")


if __name__ == "__main__":
    main()
