"""No two threads of the CUDA kernel touch the same memory unordered, as ThreadSanitizer sees it.

The kernel runs on the emulator with each CUDA thread and each copy in flight a thread of its own to
the sanitizer; only mbarriers, named barriers, __syncwarp, cluster barriers and tickets order them
(emulator/races.h). What a missing barrier allows shows though nothing went wrong in that run.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "emulator" / "race_calls.py"
FOUND = 66  # the sanitizer's exit status where it has reported something


@pytest.fixture(scope="module")
def watch(build_emulated):
    """A function that runs a group of calls and gives (exit status, output)."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    runtime = subprocess.run(
        [compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(runtime) or not shutil.which("setarch"):
        pytest.skip("needs ThreadSanitizer's library and setarch")
    library = build_emulated("emulated_kernel", "-fsanitize=thread", "-g1")

    def watch(group):
        # It wants its own way with addresses: without randomisation.
        command = ["setarch", "-R", sys.executable, SCRIPT, library, group]
        environment = {**os.environ, "LD_PRELOAD": runtime, "TSAN_OPTIONS": "halt_on_error=1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        output = result.stdout + result.stderr
        if "setarch: failed" in output:
            pytest.skip("setarch may not do that here")
        return result.returncode, output

    return watch


@pytest.mark.parametrize("group", ["mma", "float8", "wgmma", "tree", "wide", "pages"])
def test_no_race(group, watch):
    status, output = watch(group)
    assert status == 0, output[:5000]


def test_races_are_found(watch):
    status, output = watch("forgotten")
    assert status == FOUND and "data race" in output
