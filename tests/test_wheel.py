"""The installed library keeps the wheel's promise: any Python >= 3.10, torch >= 2.10, no CUDA."""

import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import leanattn

# Ubuntu 22.04's: a library built there or earlier runs on every newer Linux.
NEWEST_GLIBC = (2, 35)


def library():
    (path,) = Path(leanattn.__file__).parent.glob("_C*.so")
    return path


def run_binutils(tool, *arguments):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    return subprocess.check_output([tool, *arguments], text=True)


def dynamic_symbols(which, path):
    """Names: `symbol@VERSION` where the library that defines it has versions, else `symbol`."""
    return {line.split()[-1] for line in run_binutils("nm", "-D", which, path).splitlines()}


def undefined_symbols():
    return dynamic_symbols("--undefined-only", library())


def test_wheel_is_abi3_and_holds_the_package_alone():
    distribution = importlib.metadata.distribution("leanattn")
    assert library().name == "_C.abi3.so"
    assert "Tag: cp310-abi3-" in distribution.read_text("WHEEL")
    strangers = [
        str(f)
        for f in distribution.files
        if not f.parts[0].startswith("leanattn") or f.suffix in (".cpp", ".cu", ".h")
    ]
    assert strangers == []


def test_torch_and_python_are_used_through_their_stable_abi():
    # The C and C++ runtimes version their symbols; torch and Python do not. No name of C++ is
    # among torch's, for the stable ABI is plain C.
    unversioned = {s for s in undefined_symbols() if "@" not in s}
    allowed = re.compile(r"(aoti_torch_|torch_|Py|_Py_)\w+|_ITM_\w+|__gmon_start__")
    assert {s for s in unversioned if not allowed.fullmatch(s)} == set()


def test_a_cpu_only_torch_can_load_it():
    # The CUDA part of torch must be looked up at run time: linked, it would have to be there.
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run_binutils("readelf", "-dW", library()))
    allowed = {"c10", "torch", "torch_cpu", "stdc++", "gcc_s", "c", "m", "dl", "rt", "pthread"}
    names = {re.sub(r"^lib|\.so[.\d]*$", "", n) for n in needed if not n.startswith("ld-linux")}
    assert names - allowed == set()

    from_torch = {s for s in undefined_symbols() if re.match("(aoti_)?torch_", s)}
    torch_lib = Path(torch.__file__).parent / "lib"
    defined = dynamic_symbols("--defined-only", torch_lib / "libtorch_cpu.so")
    defined |= dynamic_symbols("--defined-only", torch_lib / "libc10.so")
    assert from_torch and from_torch - defined == set()


def test_it_keeps_its_cuda_runtime_to_itself():
    exported = dynamic_symbols("--defined-only", library())
    assert "PyInit__C" in exported
    assert {s for s in exported if s.startswith(("cuda", "__cuda"))} == set()


def test_it_does_not_ask_for_a_new_glibc():
    versions = re.findall(r"@GLIBC_(\d+)\.(\d+)", "\n".join(undefined_symbols()))
    newest = max(tuple(map(int, v)) for v in versions)
    here = platform.libc_ver()[1]
    if newest > NEWEST_GLIBC and tuple(map(int, here.split("."))) > NEWEST_GLIBC:
        pytest.skip(f"built on glibc {here}: good for this machine and newer ones")
    assert newest <= NEWEST_GLIBC
