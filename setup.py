"""Builds leanattn/_C, one abi3 library on torch's stable ABI; with CUDA kernels if there is nvcc.

What the package is stands in pyproject.toml. Nothing here runs git or downloads anything.
These environment variables change the build:

    LEANATTN_CPU_ONLY=1        no CUDA kernels, though there is nvcc
    LEANATTN_LINEINFO=1        source lines for profilers
    LEANATTN_TIMELINE=1        kernels that note when they got where, for bench/timeline.py
    LEANATTN_PTXAS_VERBOSE=1   print each kernel's registers and spills
    TORCH_CUDA_ARCH_LIST       GPU architectures, by default "8.0;9.0+PTX"
    CUDA_HOME, MAX_JOBS        where CUDA is; how many files to compile at a time
"""

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

CSRC = Path("csrc")
# The oldest torch whose stable ABI has all that csrc/ uses: 0x 02 0a = 2.10.
MIN_TORCH = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000"
# The first that reads the license in pyproject.toml as it stands there.
MIN_SETUPTOOLS = 77
# csrc/ calls cudaGetDriverEntryPointByVersion, which came with CUDA 12.5.
MIN_NVCC = (12, 5)


def fail(sentence):
    sys.exit(f"leanattn: {sentence}")


def switched_on(name):
    return os.environ.get(name, "0") not in ("", "0")


if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
    fail(
        f"building needs setuptools >= {MIN_SETUPTOOLS} in this environment, which has "
        f"{setuptools.__version__}: run `pip install --upgrade setuptools wheel ninja`"
    )
try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    if error.name != "torch":
        raise
    fail(
        "building needs torch >= 2.10 in this environment: install torch, then run "
        "`pip install --no-build-isolation .`"
    )


def find_cuda():
    """The CUDA toolkit's folder, or None with the reason why there will be no kernels."""
    if switched_on("LEANATTN_CPU_ONLY"):
        return None, "LEANATTN_CPU_ONLY is set"
    if torch.version.hip:
        return None, "this torch is built for ROCm"
    home = cpp_extension._find_cuda_home()
    if not home or not Path(home, "bin", "nvcc").is_file():
        return None, "no nvcc was found on PATH, in CUDA_HOME or in /usr/local/cuda"
    return Path(home), None


def ask_nvcc(cuda_home):
    """The folders of CUDA's headers and of its libraries.

    nvcc itself tells them best: it may be a wrapper in /usr/local/bin, and not every packager puts
    all of CUDA under one folder.
    """
    nvcc = cuda_home / "bin" / "nvcc"
    text = subprocess.check_output([nvcc, "--version"], text=True)
    release = re.search(r"release (\d+)\.(\d+)", text)
    if release and tuple(map(int, release.groups())) < MIN_NVCC:
        fail(
            f"nvcc {release[1]}.{release[2]} in {cuda_home} is too old: point CUDA_HOME to CUDA "
            "12.5 or newer, or set LEANATTN_CPU_ONLY=1 for a build without GPU kernels"
        )
    dry_run = [nvcc, "--dryrun", "-x", "cu", "/dev/null"]
    plan = subprocess.run(dry_run, check=True, stderr=subprocess.PIPE, text=True).stderr

    def folders(name):
        lines = re.findall(rf"^#\$ {name}=(.*)$", plan, re.M)
        return [Path(p) for line in lines for p in re.findall(r'"(?:-[IL])?(/[^"]*)"', line)]

    return folders("(?:SYSTEM_)?INCLUDES"), folders("LIBRARIES")


def find_cutlass():
    """CUTLASS's include folder: the submodule where it is checked out, else the PyPI package's."""
    candidates = [CSRC / "cutlass" / "include"]
    package = importlib.util.find_spec("cutlass_library")
    if package and package.origin:
        candidates.append(Path(package.origin).parent / "source" / "include")
    for include in candidates:
        if (include / "cutlass" / "cutlass.h").is_file():
            return include
    fail(
        "the GPU kernels need CUTLASS's headers: run `pip install --no-deps "
        "nvidia-cutlass==4.2.0.0` or `git submodule update --init`, or set LEANATTN_CPU_ONLY=1 "
        "for a build without GPU kernels"
    )


def cuda_targets():
    """What nvcc is to generate: sm_* is code for one GPU, compute_* is PTX for newer ones.

    9.0 gives code of sm_90a, which runs on the same GPUs as sm_90 and may use wgmma; its PTX is of
    compute_90, which newer GPUs take.

    torch reads TORCH_CUDA_ARCH_LIST too, but without it takes the GPUs that it sees, and fails
    where it sees none; it leaves everything to us once one of our flags names an architecture.
    """
    targets = []
    for arch in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not match or int(match[1]) < 8:
            fail(
                f"TORCH_CUDA_ARCH_LIST holds {arch!r}, where numbers from 8.0 on, each with +PTX "
                'or without, are allowed, as in "8.0;9.0+PTX"'
            )
        number = match[1] + match[2]
        code = "90a" if number == "90" else number
        targets += [f"sm_{code}"] + [f"compute_{number}"] * bool(match[3])
    return list(dict.fromkeys(targets))


def count_kernels():
    """csrc/cuda/instantiate/*.cu name each kernel in one line that starts so."""
    files = (CSRC / "cuda" / "instantiate").glob("*.cu")
    lines = (line for file in files for line in file.read_text().splitlines())
    return sum(line.startswith("LEANATTN_INSTANTIATE(") for line in lines)


def hash_headers():
    """16 hex digits of what the headers of csrc/ hold."""
    headers = sorted(p for p in CSRC.rglob("*.h") if "cutlass" not in p.parts)
    return hashlib.sha256(b"".join(p.read_bytes() for p in headers)).hexdigest()[:16]


def find_sources(with_cuda):
    """All of csrc/ but CUTLASS and what the tests compile; csrc/cuda/ only with CUDA."""

    def wanted(path):
        top = path.relative_to(CSRC).parts[0]
        return top != "cutlass" and not top.startswith("test") and (with_cuda or top != "cuda")

    suffixes = ("*.cpp", "*.cu") if with_cuda else ("*.cpp",)
    return sorted(str(p) for suffix in suffixes for p in CSRC.rglob(suffix) if wanted(p))


def make_extension(cuda_home, targets):
    cxx = ["-O3", "-std=c++20", "-fopenmp-simd", "-fvisibility=hidden", "-g0"]
    nvcc = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"]
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("NDEBUG", None)]
    include_dirs, library_dirs = [CSRC], []
    # First, or the linker takes the pieces of libstdc++ that some builds of torch export.
    libraries = ["stdc++"]

    if cuda_home:
        nvcc += [f"-gencode=arch=compute_{t.split('_')[1]},code={t}" for t in targets]
        # A CPU-only torch has ninja forget which headers a .cu file includes: with their hash in
        # the command, an old object is not taken for a new one.
        nvcc.append(f"-DLEANATTN_HEADERS=0x{hash_headers()}")
        # torch turns these off for the sake of its own headers.
        kinds = ["HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS"]
        nvcc += [f"-U__CUDA_NO_{kind}__" for kind in kinds]
        if switched_on("LEANATTN_LINEINFO"):
            nvcc.append("-lineinfo")
        if switched_on("LEANATTN_TIMELINE"):
            macros.append(("LEANATTN_TIMELINE", None))
        if switched_on("LEANATTN_PTXAS_VERBOSE"):
            nvcc.append("-Xptxas=-v")
        # USE_CUDA opens the CUDA part of torch's stable headers.
        macros += [("USE_CUDA", None), ("LEANATTN_WITH_CUDA", None)]
        include_dirs.append(find_cutlass())
        cuda_includes, library_dirs = ask_nvcc(cuda_home)
        include_dirs += cuda_includes
        # The static runtime, so that one library loads with and without CUDA in torch.
        libraries += ["cudart_static", "dl", "rt", "pthread"]

    # Only for g++: nvcc takes a comma in -D as the start of the next macro.
    cxx.append(f'-DLEANATTN_ARCHS="{",".join(targets) or "cpu"}"')
    return cpp_extension.CppExtension(
        "leanattn._C",
        find_sources(bool(cuda_home)),
        include_dirs=[str(p.resolve()) for p in include_dirs],
        library_dirs=[str(p.resolve()) for p in library_dirs],
        libraries=libraries,
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        # The CUDA runtime inside must stay ours alone: torch brings its own.
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        py_limited_api=True,
    )


class BuildExtension(cpp_extension.BuildExtension):
    summary = ""

    def run(self):
        print(f"leanattn: {self.summary}", flush=True)
        super().run()

    def build_extensions(self):
        version = self.distribution.get_version()
        for extension in self.extensions:
            extension.extra_compile_args["cxx"].append(f'-DLEANATTN_VERSION="{version}"')
        super().build_extensions()


if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH:
    fail(f"torch {torch.__version__} is too old: install torch 2.10 or newer")
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    fail("free-threaded Python has no stable ABI: build with an ordinary Python >= 3.10")
if not Path(sysconfig.get_path("include"), "Python.h").is_file():
    fail("Python's headers are missing: install them (Debian, Ubuntu: apt install python3-dev)")
if not shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]):
    fail("there is no C++ compiler: install one (Debian, Ubuntu: apt install g++)")

os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
# ninja's wheel puts it beside Python, which only an activated environment has on PATH.
os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")

cuda_home, reason = find_cuda()
if cuda_home:
    targets, kernels = cuda_targets(), count_kernels()
    BuildExtension.summary = (
        f"{kernels} kernels for each of {', '.join(targets)}: {kernels * len(targets)} in all"
    )
    # A CPU-only torch leaves this unset; its stable-ABI headers do just as well.
    cpp_extension.CUDA_HOME = str(cuda_home)
    # torch wants an nvcc of its own CUDA version; with the static runtime any will do.
    cpp_extension._check_cuda_version = lambda *args: None
else:
    targets = []
    BuildExtension.summary = f"a CPU-only build, because {reason}"

setuptools.setup(
    ext_modules=[make_extension(cuda_home, targets)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
