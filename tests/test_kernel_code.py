"""What the compiler makes of the decode kernel: where it once made something slow of it, and how
much of it a launch must fetch.

In a model every launch finds its code and its parameters cold, and waits for each line of them: 128
bytes, 8 instructions. So the ways that a launch cannot go around have limits, some 15% above what
they were when written.
"""

import collections
import operator
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.utils.cpp_extension
from native.build import CSRC, cutlass_headers

KERNELS = {
    "lean": "128, 8, Kind::kMma, Float16, LeanFeatures<true, false>",
    "masked": "128, 8, Kind::kMma, Float16, MaskedFeatures<false>",
    "append": "128, 8, Kind::kMma, Float16, AppendFeatures<true, false>",
    "full": "128, 8, Kind::kMma",
}
CUDA_HOME = torch.utils.cpp_extension._find_cuda_home() or "/nowhere"


class Cost(NamedTuple):
    instructions: int
    code_lines: int
    parameter_lines: int


# Where a way begins, and the instructions that it comes by, the last of them its end.
WAYS = {
    "first K": ("entry", "UTMALDG"),
    "first K, by lengths": ("entry", r"REDUX\.SUM", "UTMALDG"),
    "first q, by lengths": ("entry", r"REDUX\.SUM", "UTMALDG", "UBLKCP"),
    # From the last product: the warps' states meet in shared memory, are merged, and written.
    "end of a whole item": ("HMMA", r"\bSTS\b", r"MUFU\.EX2", r"\bSTG\.E(\.64)? ", "EXIT"),
}
# Instructions; some 950 of each are of teams of several clusters, out of line.
SIZES = {"lean": 7500, "masked": 10400, "append": 8000, "full": 17000}
LIMITS = {
    "first K": {
        "lean": Cost(215, 36, 4),
        "masked": Cost(220, 36, 4),
        "append": Cost(260, 41, 5),
        "full": Cost(295, 46, 6),
    },
    "first K, by lengths": {
        "lean": Cost(315, 51, 4),
        "masked": Cost(315, 57, 4),
        "append": Cost(340, 55, 5),
        "full": Cost(385, 67, 6),
    },
    "first q, by lengths": {
        "lean": Cost(385, 59, 5),
        "masked": Cost(390, 67, 5),
        "append": Cost(415, 66, 6),
        "full": Cost(495, 83, 7),
    },
    "end of a whole item": {
        "lean": Cost(295, 45, 4),
        "masked": Cost(310, 50, 4),
        "append": Cost(295, 45, 5),
        "full": Cost(310, 53, 6),
    },
}
# Where no way goes: what is there for warps that have come apart, and the fixups of cut items.
AVOIDED = r"WARPSYNC\.COLLECTIVE|MEMBAR|UCGABAR"
BYTES = 16  # an instruction
LINE = 128
PARAMETERS = 0x210  # where they begin, among the constants


class Code:
    """A kernel's instructions by their addresses, and which of them can follow which."""

    def __init__(self, listing):
        self.instructions, self.labels = {}, {}
        labels = []  # of the next instruction
        for line in listing.splitlines():
            if label := re.match(r"(\S+):$", line):
                labels.append(label[1])
            elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
                address = int(found[1], 16)
                self.instructions[address] = found[2]
                self.labels.update(dict.fromkeys(labels, address))
                labels.clear()

    def after(self, address, calls):
        """What can follow in one thread: (address, where the calls that it is in return to)."""
        parts = re.match(r"(@\S+\s+)?(\S+)\s*(.*)", self.instructions[address])
        guard, name, operands = parts.groups()
        target = re.search(r"`\((\S+)\)", operands)
        target = target and self.labels[target[1]]
        jump = None
        if name.startswith("BRA") and not name.startswith("BRA.DIV"):
            jump = (target, calls)
        elif name.startswith("CALL.REL"):
            jump = (target, (*calls, address + BYTES))
        elif name.startswith("RET.REL"):
            jump = (calls[-1], calls[:-1])
        # A branch may have a second predicate, as an operand.
        if guard or "," in operands or not (jump or name == "EXIT"):
            yield address + BYTES, calls
        if jump:
            yield jump

    def shortest_way(self, start, *stops):
        """The addresses from a `start` to the last of the stops, by the others in order."""
        starts = [a for a, text in self.instructions.items() if start in text]
        states = [(a, (), 0) for a in ([0] if start == "entry" else starts)]
        came_from = dict.fromkeys(states)
        queue = collections.deque(states)
        while queue:
            state = queue.popleft()
            address, calls, stop = state
            stop += bool(re.search(stops[stop], self.instructions[address]))
            if stop == len(stops):
                way = []
                while state:
                    way.append(state[0])
                    state = came_from[state]
                return way
            for following, inside in self.after(address, calls):
                new = (following, inside, stop)
                if new not in came_from and not re.search(AVOIDED, self.instructions[following]):
                    came_from[new] = state
                    queue.append(new)
        raise AssertionError(f"no way from {start} by {stops}")

    def cost(self, way):
        constant = r"c\[0x0\]\[(?:\S+\+)?(0x[0-9a-f]+)\]"
        texts = [self.instructions[address] for address in way]
        used = {int(offset, 16) for text in texts for offset in re.findall(constant, text)}
        lines = {offset // LINE for offset in used if offset >= PARAMETERS}
        return Cost(len(way), len({address // LINE for address in way}), len(lines))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function that compiles one of KERNELS for sm_90a: where its .cubin and its .ptx are."""
    nvcc = Path(CUDA_HOME, "bin", "nvcc")
    if not nvcc.is_file():
        pytest.skip("needs nvcc")
    cutlass = cutlass_headers()
    if cutlass is None:
        pytest.skip("needs CUTLASS's headers")
    folder = tmp_path_factory.mktemp("kernel")

    def compiled(kernel):
        cubin = folder / f"{kernel}.cubin"
        if not cubin.exists():
            source = folder / f"{kernel}.cu"
            source.write_text(
                '#include "cuda/launch_kernel.h"\n'
                f"namespace leanattn {{ LEANATTN_INSTANTIATE({KERNELS[kernel]}) }}\n"
            )
            command = [nvcc, "-std=c++20", "-O3", "-DNDEBUG", f"-I{CSRC}", f"-I{cutlass}"]
            command += ["-arch=sm_90a", "-cubin", "-keep", "-keep-dir", folder, "-o", cubin, source]
            subprocess.run(command, check=True)
        return cubin, cubin.with_suffix(".ptx")

    return compiled


@pytest.fixture(scope="module")
def code(compiled):
    """A function that disassembles one of KERNELS, by a CUDA toolkit's nvdisasm or PyPI's."""
    packages = Path(sysconfig.get_path("platlib")).glob("nvidia/*/bin")
    folders = [os.environ["PATH"], f"{CUDA_HOME}/bin", *map(str, packages)]
    disassembler = shutil.which("nvdisasm", path=os.pathsep.join(folders))
    if not disassembler:
        pytest.skip("needs nvdisasm: pip install --no-deps -r requirements-cuda.txt")

    def code(kernel):
        command = [disassembler, "-c", compiled(kernel)[0]]
        return Code(subprocess.check_output(command, text=True))

    return code


@pytest.mark.parametrize("kernel", KERNELS)
def test_parameters_are_constants(compiled, kernel):
    """A pointer to the kernel's parameters in an object made every use of them a load from memory;
    what is left are the lengths and offsets that lie there. locate_by_all, out of line for large
    batches, has nothing but a pointer."""
    text = compiled(kernel)[1].read_text().split(".entry")[1].split("\n.func")[0]
    loads = re.findall(r"\bld\.(?:[us](?:8|32|64)|v2\.u32)\b", text)
    assert text.count("ld.param.") > 100
    assert len(loads) < 30, f"{len(loads)} generic loads of integers"


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_loop_over_lanes(code, kernel):
    """Bulk copies and mbarrier.init are for one lane, and ptxas must know it; cp.async is not."""
    instructions = code(kernel).instructions
    looping = [instructions[a - BYTES] for a, text in instructions.items() if "BRA.U.ANY" in text]
    assert any("UTMALDG" in text for text in instructions.values())
    assert [text for text in looping if "ARRIVES.LDGSTSBAR" not in text] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_cold_ways_are_short(code, kernel):
    found = code(kernel)
    if b"release 13.0" not in subprocess.check_output([f"{CUDA_HOME}/bin/nvcc", "--version"]):
        pytest.skip("the limits are of nvcc 13.0")
    size = len(found.instructions)
    costs = {name: found.cost(found.shortest_way(*stops)) for name, stops in WAYS.items()}
    print(f"{kernel}: {size} instructions", *costs.items(), sep="\n")  # shown where this fails
    assert size <= SIZES[kernel]
    assert {n: c for n, c in costs.items() if any(map(operator.gt, c, LIMITS[n][kernel]))} == {}
