"""What a result file says about where its figures come from."""

import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import leanattn
from bench import ROOT, carried

VARIABLES = ("LEANATTN_LOADER", "LEANATTN_FEATURES", "LEANATTN_HEAD_PAIRS", "LEANATTN_LAYOUT",
             "LEANATTN_NUM_UNITS", "LEANATTN_LAUNCHES", "LEANATTN_CHECK",
             "CUDA_VISIBLE_DEVICES")  # fmt: skip
PEER_PACKAGES = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "flashinfer-python", "flash-attn",
                 "flash-attn-3", "triton")  # fmt: skip


def provenance(device, commit=None):
    """{key: text}, in the order to print."""
    library = Path(leanattn._C.__file__)
    header = {
        "command": shlex.join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": _device_text(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "leanattn": torch.ops.leanattn.build_info().replace(";", ", built for "),
        "commit": commit or os.environ.get("LEANATTN_COMMIT") or _git_commit(),
        "library sha256": hashlib.sha256(library.read_bytes()).hexdigest(),
        "wheel sha256": _wheel_hash(),
    }
    for name in VARIABLES:
        if os.environ.get(name):
            header[name] = os.environ[name]
    for file, sha256 in carried.hashes().items():
        header[f"{file} sha256"] = sha256
    for package in PEER_PACKAGES:
        try:
            header[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return header


def _device_text(device):
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, {properties.multi_processor_count} SMs, "
        f"{properties.L2_cache_size >> 20} MiB of L2"
    )


def _driver():
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "none"
    match = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return match[0] if match else "unknown"


def _git_commit():
    """With "+" where tracked files differ from it; "unknown" where there is no git."""
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + "+" * bool(run("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _wheel_hash():
    """As pip noted it where it installed a wheel file."""
    try:
        text = metadata.distribution("leanattn").read_text("direct_url.json")
        return json.loads(text)["archive_info"]["hashes"]["sha256"]
    except (metadata.PackageNotFoundError, TypeError, KeyError, ValueError):
        return "unknown"
