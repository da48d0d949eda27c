"""Compiles C++ for the tests into Python modules, once for each state of the sources."""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pybind11
import torch.utils.cpp_extension

CSRC = Path(__file__).parents[2] / "csrc"
EMULATOR = Path(__file__).parents[1] / "emulator"


def load_module(source, folder, *options):
    """The module of `source`, named after it, from `folder` where it is already there."""
    return import_module(build_module(source, folder, *options), source.stem)


def import_module(library, name):
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_module(source, folder, *options):
    """Where the library of `source` is, in `folder`."""
    command = [*compiler(), "-O1", "-shared", *options, f"-I{source.parent}"]
    command += [f"-I{pybind11.get_include()}", str(source)]
    key = [command, pybind11.__version__]
    library = library_path(source.stem, folder, key, source.parent, [source])
    with unless_built(library) as unfinished:
        if unfinished:
            subprocess.run([*command, "-o", unfinished], check=True)
    return library


def build_emulated_gpu(folder):
    """Where leanattn/_C is, for a GPU that is emulated: see emulator/gpu.h. EMULATED_GPU_CXXFLAGS
    are more of g++'s options."""
    torch_path = Path(torch.__file__).parent
    users = shlex.split(os.environ.get("EMULATED_GPU_CXXFLAGS", ""))
    # A GPU runs the newest code in the wheel that is not newer than itself.
    arch = 900 if int(os.environ.get("EMULATED_GPU_CAPABILITY", 90)) >= 90 else 800
    options = [*compiler(), "-O2", "-fopenmp-simd", "-Wno-psabi", *emulator_options(arch), *users]
    options += ["-DUSE_CUDA", "-DLEANATTN_WITH_CUDA", '-DLEANATTN_ARCHS="emulated"']
    options += ['-DLEANATTN_VERSION="emulated"', "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    options += [f"-I{EMULATOR}", f"-I{torch_path / 'include'}"]
    # Functions of which csrc/ is given others, in gpu.cpp, which itself calls the true ones.
    replaced = ["aoti_torch_get_device_type", "aoti_torch_get_device_index"]
    replaced += ["aoti_torch_empty_strided", "dlopen", "dlsym"]
    product = [f"-D{name}=emulated_{name}" for name in replaced]
    product += ["-include", str(EMULATOR / "gpu.h"), "-x", "c++"]
    link = [*users, "-shared", f"-L{torch_path / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    sources = [EMULATOR / "gpu.cpp", *CSRC.glob("*.cpp")]
    sources += [p for folder in ("binding", "plan", "cpu") for p in CSRC.glob(f"{folder}/*.cpp")]
    sources += [p for p in CSRC.glob("cuda/**/*.cu") if p.name != "read_floor.cu"]
    sources.sort(key=lambda path: "instantiate" not in path.parts)  # the longest to compile first
    library = library_path("leanattn_gpu", folder, [options, product, link], EMULATOR, sources)

    with unless_built(library) as unfinished, tempfile.TemporaryDirectory() as objects:
        if not unfinished:
            return library

        def compile_one(source):
            target = str(Path(objects, f"{source.name}.o"))
            more = [] if source.name == "gpu.cpp" else product
            subprocess.run([*options, *more, "-c", str(source), "-o", target], check=True)
            return target

        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            compiled = list(pool.map(compile_one, sources))
        subprocess.run([*compiler(), *compiled, *link, "-o", unfinished], check=True)
    return library


def compiler():
    command = shlex.split(os.environ.get("CXX", "g++"))
    command += ["-std=c++20", "-g0", "-fPIC", "-fvisibility=hidden"]
    # Some distributions turn it on; to it the emulator's jumps from stack to stack are errors.
    command += ["-U_FORTIFY_SOURCE"]
    return [*command, f"-I{CSRC}", f"-I{sysconfig.get_path('include')}"]


def emulator_options(arch=900):
    """How CUDA code is compiled for the emulator; None without CUDA's headers."""
    headers = cuda_headers()
    return headers and [f"-DLEANATTN_EMULATED_ARCH={arch}", f"-I{EMULATOR / 'include'}", *headers]


def cuda_headers():
    """The compiler's options that find CUDA's headers; None without them."""
    nvcc = Path(torch.utils.cpp_extension._find_cuda_home() or "/nowhere", "bin", "nvcc")
    if not nvcc.is_file():
        return None
    # nvcc, which may be a wrapper, knows best where they are.
    command = [nvcc, "--dryrun", "-x", "cu", "/dev/null"]
    plan = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    lines = re.findall(r"^#\$ (?:SYSTEM_)?INCLUDES=(.*)", plan, re.M)
    return [option for line in lines for option in shlex.split(line)]


def cutlass_headers():
    """Where CUTLASS's headers are; None without them."""
    checkout = CSRC / "cutlass" / "include"
    if checkout.is_dir():
        return checkout
    package = importlib.util.find_spec("cutlass_library")
    return package and Path(package.origin).parent / "source" / "include"


def library_path(name, folder, key, headers, sources):
    """Of the library in `folder` that is of this key, these sources, and the headers in the folder
    `headers` and in csrc/."""
    digest = hashlib.sha256(repr(key).encode())
    kinds = (".h", ".hpp", ".cu")
    included = (p for at in (headers, CSRC) for p in at.rglob("*") if p.suffix in kinds)
    included = (p for p in included if CSRC / "cutlass" not in p.parents)
    for path in sorted({*included, *sources}):
        digest.update(path.read_bytes())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return Path(folder) / f"{name}-{digest.hexdigest()[:16]}{suffix}"


@contextlib.contextmanager
def unless_built(library):
    """Where to build it, a path that becomes it; None if it is there already."""
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist's workers: one compiles, the others wait
        if library.exists():
            yield None
            return
        unfinished = library.with_suffix(".unfinished")
        yield str(unfinished)
        unfinished.replace(library)
