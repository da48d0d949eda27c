"""tests/fuzz.py on an emulated GPU: `python tests/emulator/fuzz_gpu.py --cases 1000 --jobs 2`."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from emulator.gpu import EmulatedGpu

GPU = EmulatedGpu(tempfile.gettempdir())

import fuzz  # noqa: E402  leanattn must find the emulated GPU


def run(seed, indices, device):
    """In a process of the fuzzer's, which has an emulated GPU of its own."""
    return fuzz.run(seed, indices, GPU.device)


if __name__ == "__main__":
    fuzz.main(run, ["cuda"])
