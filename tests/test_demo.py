"""python -m leanattn: the demo and the information, as a user runs them."""

import re
import sys

import pytest
import torch

from leanattn.__main__ import main
from leanattn.demo import run as demo
from leanattn.demo import timing
from leanattn.demo.info import code_for

TINY = ["--lengths", "5,300,1,129"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A few runs are enough to see that there are times."""
    monkeypatch.setattr(timing, "_SECONDS", 0.1)


@pytest.fixture
def run(run_python):
    """A function that gives the finished process."""
    return lambda *arguments, **environment: run_python("-m", "leanattn", *arguments, **environment)


def test_demo_of_a_tiny_batch(run):
    """Table and schedule on stdout, nothing on stderr, no file."""
    process = run("--no-picture", "--device", "cpu", *TINY)
    assert process.returncode == 0 and process.stderr == ""
    out = process.stdout
    assert "4 sequences of 1 to 300 tokens, 32/8 heads, D=128, float32" in out
    assert len(re.findall(r"\d\.\de-0\d +\d+\.\d+ [mu]s +\d+\.\d", out)) == 3
    assert "56 tiles of 128 tokens" in out and "picture" not in out


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_demo_on_a_gpu(device, run):
    """The same with the read floor beside it."""
    process = run("--no-picture", "--device", device, *TINY)
    assert process.returncode == 0 and process.stderr == ""
    assert "bfloat16" in process.stdout and "of floor" in process.stdout
    assert re.search(r"read floor +\d+\.\d+ us +\d+\.\d +100\.0%", process.stdout)


def test_demo_writes_its_picture(tmp_path, monkeypatch, capsys):
    """Where it is told to, else into the current folder; the path is printed."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["--device", "cpu", *TINY]) == 0
    assert (tmp_path / "leanattn-schedule.png").read_bytes().startswith(b"\x89PNG")
    assert "picture: leanattn-schedule.png" in capsys.readouterr().out
    path = tmp_path / "other.png"
    assert main(["--device", "cpu", "--picture", str(path), *TINY]) == 0
    assert path.read_bytes().startswith(b"\x89PNG") and str(path) in capsys.readouterr().out


def test_demo_without_rich_and_matplotlib(tmp_path, monkeypatch, capsys):
    """A plain table and a note instead of a picture; a picture asked for by name is an error."""
    for module in ("rich", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    assert main(["--device", "cpu", *TINY]) == 0
    shown = capsys.readouterr()
    assert re.search(r"^leanattn, one call +\d\.\de-0\d +\d", shown.out, re.M)
    assert "matplotlib" in shown.err and list(tmp_path.iterdir()) == []
    assert main(["--device", "cpu", "--picture", "here.png", *TINY]) == 1
    assert "[demo]" in capsys.readouterr().err


def test_demo_says_when_it_is_wrong(monkeypatch, capsys):
    """The comparison with fp64 is one: a lost key changes the exit code."""

    def lose_a_key(batch):
        lengths = batch.cache_seqlens - 1
        return torch.ops.leanattn.decode(batch.q, batch.k_cache, batch.v_cache, lengths)

    monkeypatch.setattr(demo, "_decode", lose_a_key)
    assert main(["--device", "cpu", "--no-picture", *TINY]) == 1
    assert "WRONG" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lengths", "0"],
        ["--lengths", "5,x"],
        ["--lengths", ""],
        ["--device", "tpu"],
        ["--device", "cuda:x"],
        ["nonsense"],
        ["--picture", "a.png", "--no-picture"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    """argparse's own exit code, and a message about the argument."""
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_errors_are_one_line(tmp_path, capsys):
    """No traceback for what the user can mend."""
    if not torch.cuda.is_available():
        assert main(["--device", "cuda", "--no-picture", *TINY]) == 1
        assert capsys.readouterr().err.startswith("leanattn: ")
    if sys.modules.get("matplotlib") is not None:
        missing = tmp_path / "no" / "such" / "folder.png"
        assert main(["--device", "cpu", "--picture", str(missing), *TINY]) == 1
        error = capsys.readouterr().err
        assert error.startswith("leanattn: ") and str(missing) in error


def test_info(run):
    """Versions, targets, devices, and the variables that change what runs."""
    process = run("info", LEANATTN_NUM_UNITS="3")
    assert process.returncode == 0 and process.stderr == ""
    lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in process.stdout.splitlines())
    assert lines["torch"] == torch.__version__
    assert lines["leanattn"] == torch.ops.leanattn.build_info().split(";")[0]
    assert "C++" in lines["cpu"]
    assert lines["LEANATTN_NUM_UNITS"].startswith("3 ")
    assert lines["LEANATTN_LOADER"].startswith("not set")
    assert {"built for", "python", "CUDA", "LEANATTN_CHECK"} <= lines.keys()


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_info_on_a_gpu(device, run):
    """Which loader would run, and that the variable changes it."""
    assert "the CUDA kernels" in run("info").stdout
    assert "cp.async copies" in run("info", LEANATTN_LOADER="cp_async").stdout
    assert "raises" in run("info", LEANATTN_LOADER="dma").stdout


@pytest.mark.parametrize(
    "targets, capability, expected",
    [
        (["sm_80", "sm_90a", "compute_90"], (8, 0), "sm_80"),
        (["sm_80", "sm_90a", "compute_90"], (8, 9), "sm_80"),
        (["sm_80", "sm_90a", "compute_90"], (9, 0), "sm_90a"),
        (["sm_80", "sm_90a", "compute_90"], (12, 0), "compute_90"),
        (["sm_80", "sm_90a", "compute_90"], (7, 5), None),
        (["compute_80"], (9, 0), "compute_80"),
        (["sm_90a"], (9, 0), "sm_90a"),
        (["sm_90a", "compute_90a"], (10, 0), None),
        (["sm_100f"], (10, 3), "sm_100f"),
        (["sm_89", "compute_80"], (8, 6), "compute_80"),
        (["cpu"], (9, 0), None),
    ],
)
def test_code_for(targets, capability, expected):
    """Binary code before PTX, and neither on a GPU that cannot run it."""
    assert code_for(targets, *capability) == expected
