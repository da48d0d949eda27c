"""Compiles C++ for the tests into Python modules, once for each state of the sources."""

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
    return import_module(build_module(source, folder, *options), source.stem)


def import_module(library, name):
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_module(source, folder, *options):
    """Where the library of `source` is, in `folder`."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++20", "-O1", "-g0", "-shared"]
    command += ["-fPIC", "-fvisibility=hidden", *options, f"-I{source.parent}", f"-I{CSRC}"]
    command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", str(source)]
    key = hashlib.sha256(repr((command, pybind11.__version__)).encode())
    kinds = (".h", ".hpp", ".cu")
    included = (p for at in (source.parent, CSRC) for p in at.rglob("*") if p.suffix in kinds)
    for path in [source, *sorted(p for p in included if CSRC / "cutlass" not in p.parents)]:
        key.update(path.read_bytes())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    library = Path(folder) / f"{source.stem}-{key.hexdigest()[:16]}{suffix}"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist's workers: one compiles, the others wait
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.replace(library)
    return library
