"""What the compiler makes of the decode kernel, where it once made something slow of it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch.utils.cpp_extension
from native.build import CSRC, cutlass_headers

SOURCE = """
#include "cuda/launch_kernel.h"
namespace leanattn { LEANATTN_INSTANTIATE(64, 8, Kind::kMma) }
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function that compiles one kernel for sm_90a, to "ptx" or a "cubin"."""
    cuda_home = torch.utils.cpp_extension._find_cuda_home() or "/nowhere"
    nvcc = Path(cuda_home, "bin", "nvcc")
    if not nvcc.is_file():
        pytest.skip("needs nvcc")
    cutlass = cutlass_headers()
    if cutlass is None:
        pytest.skip("needs CUTLASS's headers")
    folder = tmp_path_factory.mktemp("kernel")
    source = folder / "kernel.cu"
    source.write_text(SOURCE)

    def compiled(kind):
        path = folder / f"kernel.{kind}"
        target = "compute_90a" if kind == "ptx" else "sm_90a"
        command = [nvcc, "-std=c++20", "-O3", "-DNDEBUG", f"-I{CSRC}", f"-I{cutlass}"]
        subprocess.run([*command, f"-arch={target}", f"-{kind}", "-o", path, source], check=True)
        return path

    return compiled


def test_parameters_are_constants(compiled):
    """A pointer to the kernel's parameters in an object made every use of them a load from memory;
    what is left are the lengths and offsets that lie there."""
    text = compiled("ptx").read_text()
    loads = re.findall(r"\bld\.(?:[us](?:8|32|64)|v2\.u32)\b", text)
    assert text.count("ld.param.") > 100
    assert len(loads) < 30, f"{len(loads)} generic loads of integers"


def test_no_loop_over_lanes(compiled):
    """Bulk copies and mbarrier.init are for one lane, and ptxas must know it."""
    disassembler = shutil.which("cuobjdump")
    if not disassembler:
        pytest.skip("needs cuobjdump")
    command = [disassembler, "-sass", compiled("cubin")]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "UTMALDG" in text
    assert "BRA.U.ANY" not in text
