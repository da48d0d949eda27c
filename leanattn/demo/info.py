"""What is installed here, and which code a decode would run: `python -m leanattn info`."""

import argparse
import os
import platform
import re
from pathlib import Path

import torch

import leanattn

_VARIABLES = {
    "LEANATTN_LOADER": "tma or cp_async: how CUDA kernels fetch K and V",
    "LEANATTN_FEATURES": "lean, masked or all: what CUDA kernels must be able to do at least",
    "LEANATTN_HEAD_PAIRS": "1 or 0: two KV heads with short rows are read as one, or never",
    "LEANATTN_NUM_UNITS": "how many units share the work",
    "LEANATTN_LAYOUT": "stream_k, teams:N, clusters:N or clusters:N*M: how the work is laid out",
    "LEANATTN_LAUNCHES": "1 or 2: CUDA launches of an append_decode that can be one",
    "LEANATTN_BACKEND": "auto, leanattn or torch: where SDPA and transformers' decode steps go",
    "LEANATTN_CHECK": "1: wrong lengths raise instead of being clamped",
}


def info():
    """A few lines of text."""
    rows = [
        ("leanattn", leanattn.__version__),
        ("built for", ", ".join(build_targets()) + ("" if has_kernels() else " (no CUDA kernels)")),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("CUDA", _cuda_text()),
    ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows += [(str(device), f"{device_name(device)}: {path_on(device)}") for device in devices]
    for name, meaning in _VARIABLES.items():
        rows.append((name, f"{os.environ.get(name) or 'not set'} ({meaning})"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def build_targets():
    """["cpu"], or what nvcc generated: sm_* is code for a GPU, compute_* is PTX for newer ones."""
    return torch.ops.leanattn.build_info().split(";")[1].split(",")


def has_kernels():
    return build_targets() != ["cpu"]


def cuda_problem():
    """Why CUDA cannot be used here, or "" where it can."""
    if not has_kernels():
        return "this leanattn was built without CUDA kernels"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""


def device_argument(text):
    """argparse's type of a device: cpu, cuda or cuda:N."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return device


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} thread{'s' * (threads != 1)}"


def path_on(device):
    """Which implementation a call on the device would run."""
    if device.type == "cpu":
        return "the C++ implementation"
    if problem := cuda_problem():
        return problem
    major, minor = torch.cuda.get_device_capability(device)
    code = code_for(build_targets(), major, minor)
    if code is None:
        return f"no kernel for compute capability {major}.{minor} in this build"
    loader = os.environ.get("LEANATTN_LOADER") or "tma"
    if loader not in ("tma", "cp_async"):
        return f"raises: LEANATTN_LOADER must be 'tma' or 'cp_async', got '{loader}'"
    has_tma = loader == "tma" and major >= 9 and int(re.search(r"\d+", code)[0]) >= 90
    source = f"{code} compiled by the driver" if code.startswith("compute") else code
    units = torch.ops.leanattn.max_units(device.index)
    copies = "TMA copies where strides allow, else cp.async" if has_tma else "cp.async copies"
    return f"the CUDA kernels ({source}) on {units} SMs, {copies}"


def code_for(targets, major, minor):
    """Which of the build's targets the CUDA driver takes for a compute capability, or None.

    Code for sm_XY runs on X.Z with Z >= Y; PTX is compiled for what is at least as new; names that
    end in a letter are for that one capability, or family.
    """
    here = 10 * major + minor
    exact, ptx = [], []
    for target in targets:
        match = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", target)
        if not match:
            continue
        number = int(match[2])
        if match[3] == "a" and number != here:
            continue
        if match[3] == "f" and number // 10 != major:
            continue
        if match[1] == "sm" and number // 10 == major and number <= here:
            exact.append((number, target))
        if match[1] == "compute" and number <= here:
            ptx.append((number, target))
    return max(exact or ptx, default=(0, None))[1]


def _cuda_text():
    if torch.version.cuda is None:
        return "none in this torch"
    driver = _driver_version()
    return f"{torch.version.cuda} in torch, " + (f"driver {driver}" if driver else "no driver")


def _driver_version():
    """Of the NVIDIA driver that is loaded, "" without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return match[0] if match else ""


def _cpu_model():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return match[1] if match else f"{platform.machine()} CPU"
