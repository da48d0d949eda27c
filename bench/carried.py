"""Peers that were brought along in a folder, for a GPU machine without network.

The environment variable PEERS_DIR names it. It may hold `_vllm_fa3_C.abi3.so` and
`_flashmla_C.abi3.so`, the files of vLLM's wheel that are FlashAttention-3 and FlashMLA, which run
without vLLM, and `flashinfer_site.tar.xz`, Python
packages with FlashInfer among them, its kernels compiled ahead; what FlashInfer imports may lie in
`deps` there. Each file may be compressed: `.so.xz`.
"""

import functools
import hashlib
import lzma
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

FA3 = "_vllm_fa3_C.abi3.so"
FLASHMLA = "_flashmla_C.abi3.so"
FLASHINFER = "flashinfer_site.tar.xz"


@functools.cache
def fa3():
    """vLLM's FlashAttention-3 as torch.ops, or None."""
    return _ops(FA3)


@functools.cache
def flashmla():
    """FlashMLA as torch.ops, or None."""
    return _ops(FLASHMLA)


@functools.cache
def find_flashinfer():
    """Lets Python find the FlashInfer of the folder, if there is one. It then compiles nothing: a
    kernel that it does not bring is one that a shape does without."""
    archive = _file(FLASHINFER)
    if archive is None:
        return
    for name, value in (("FLASHINFER_DISABLE_JIT", "1"), ("FLASHINFER_CUDA_ARCH_LIST", "9.0a"),
                        ("FLASHINFER_WORKSPACE_BASE", tempfile.gettempdir())):  # fmt: skip
        os.environ.setdefault(name, value)
    folder = _unpacked(archive, _extract)
    sys.path.insert(0, str(folder))
    sys.path.append(str(folder / "deps"))  # what is installed goes first


def hashes():
    """{file: sha256} of what lies in the folder, to say where figures come from."""
    names = (FA3, f"{FA3}.xz", FLASHMLA, f"{FLASHMLA}.xz", FLASHINFER)
    found = (_in_folder(name) for name in names)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found if path}


def _ops(name):
    path = _file(name)
    if path is None:
        return None
    torch.ops.load_library(path)
    return getattr(torch.ops, name.removesuffix(".abi3.so"))


def _in_folder(name):
    path = Path(os.environ.get("PEERS_DIR", ""), name)
    return path if os.environ.get("PEERS_DIR") and path.exists() else None


def _file(name):
    """The file's path, decompressed if need be; None where it is there neither way."""
    path = _in_folder(name)
    compressed = _in_folder(f"{name}.xz")
    return path or (compressed and _unpacked(compressed, _decompress))


def _unpacked(path, unpack):
    """What `unpack` makes of `path`, in the folder for temporary files, once for all processes."""
    size = path.stat().st_size
    target = Path(tempfile.gettempdir(), "leanattn-peers", f"{path.name.split('.')[0]}-{size}")
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        begun = target.with_name(f"{target.name}-{os.getpid()}")
        unpack(path, begun)
        os.replace(begun, target)
    return target


def _decompress(path, target):
    with lzma.open(path) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 22)


def _extract(path, target):
    with tarfile.open(path) as archive:
        archive.extractall(target, filter="data")
