"""Compiles C++ for the tests, once for each state of the sources, and imports it as a module."""

import fcntl
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pybind11

CSRC = Path(__file__).parents[2] / "csrc"


def load_module(source, folder, *options):
    """The module of `source`, named after it, from `folder` where it is already there."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++20", "-O1", "-g0", "-shared"]
    command += ["-fPIC", "-fvisibility=hidden", *options, f"-I{source.parent}", f"-I{CSRC}"]
    command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", str(source)]
    key = hashlib.sha256(repr((command, pybind11.__version__)).encode())
    kinds = (".h", ".hpp", ".cu")
    included = (p for at in (source.parent, CSRC) for p in at.rglob("*") if p.suffix in kinds)
    for path in [source, *sorted(p for p in included if CSRC / "cutlass" not in p.parents)]:
        key.update(path.read_bytes())
    name = source.stem
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    library = Path(folder) / f"{name}-{key.hexdigest()[:16]}{suffix}"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist's workers: one compiles, the others wait
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.replace(library)
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
