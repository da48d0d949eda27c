"""The fuzzer on an emulated GPU: `python tests/emulator/fuzz_gpu.py --cases 1000 --jobs 2`."""

import argparse
import concurrent.futures
import multiprocessing
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from emulator.gpu import EmulatedGpu

GPU = EmulatedGpu(tempfile.gettempdir())

import fuzz  # noqa: E402  leanattn must find the emulated GPU


def run(seed, indices):
    return fuzz.run(seed, indices, GPU.device)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--case", type=int)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if options.case is not None:
        tally = run(options.seed, [options.case])
    else:
        tally = fuzz.Tally()
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.jobs, spawn) as pool:
            ranges = [range(i, options.cases, options.jobs) for i in range(options.jobs)]
            for share in pool.map(run, [options.seed] * options.jobs, ranges):
                tally.add(share)
    print(*tally.failures, tally.table(), sep="\n")
    sys.exit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
