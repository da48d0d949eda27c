"""Compiles headers.cpp, once for each state of the sources, and imports it."""

import fcntl
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pybind11

SOURCE = Path(__file__).with_name("headers.cpp")
CSRC = Path(__file__).parents[2] / "csrc"


def load_headers(folder):
    """The module, from `folder` where it is already there."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++20", "-O1", "-g0", "-shared"]
    command += ["-fPIC", "-fvisibility=hidden", f"-I{CSRC}", f"-I{pybind11.get_include()}"]
    command += [f"-I{sysconfig.get_path('include')}", str(SOURCE)]
    key = hashlib.sha256(repr((command, pybind11.__version__)).encode())
    for path in [SOURCE, *sorted(CSRC.glob("*.h"))]:
        key.update(path.read_bytes())
    library = (
        Path(folder) / f"headers-{key.hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    )
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist's workers: one compiles, the others wait
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.replace(library)
    spec = importlib.util.spec_from_file_location("headers", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
