"""The bench of prefills: its shapes, its run on a CPU, what it says of wrong answers."""

import csv
import sys
from pathlib import Path

import pytest
import torch

import leanattn

sys.path.append(str(Path(__file__).parent.parent))  # bench takes it off again, as in test_bench

from bench import prefill  # noqa: E402


def test_shapes():
    """ONNX Runtime's grid."""
    shapes = prefill.prefill(False)
    assert len(shapes) == len(set(shapes)) == 31
    assert prefill.Shape(32, 512, 32, 64, False) in shapes
    assert prefill.Shape(1, 16384, 16, 128, False) in shapes
    assert {s.head_dim for s in shapes if s.heads == 8} == {40, 80, 160}
    assert prefill.Shape(2, 100, 3, 64, False).flops == 4 * 2 * 100 * 100 * 3 * 64
    assert prefill.Shape(2, 100, 3, 64, True).flops == 2 * 2 * 100 * 100 * 3 * 64


@pytest.mark.parametrize("causal", [False, True])
def test_a_run(causal, tmp_path, capsys):
    path = tmp_path / "prefill.csv"
    arguments = ["--device", "cpu", "--set", "tiny", "--csv", str(path), "--causal"]
    assert prefill.main(arguments if causal else arguments[:-1]) == 0
    printed = capsys.readouterr().out
    assert "of the fastest backend's time on [B, H, S, D]" in printed
    lines = path.read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
    assert any(line.startswith("# device: ") for line in lines)
    assert len(rows) == 2 * (len(prefill.FORMATS) + len(prefill.BACKENDS))
    for row in rows:
        assert bool(row["us"]) == bool(row["tflops"]) != bool(row["reason"])
        assert row["us"] or row["implementation"] in ("cudnn", "efficient")


def test_a_wrong_answer_is_not_timed(monkeypatch):
    right = leanattn.flash_attn_qkvpacked_func
    monkeypatch.setattr(leanattn, "flash_attn_qkvpacked_func", lambda *a, **o: right(*a, **o) * 1.1)
    shape = prefill.Shape(1, 40, 2, 16, False)
    (row,) = (
        r for r in prefill.measure(shape, torch.device("cpu")) if r["implementation"] == "qkv"
    )
    assert row["us"] is None and "wrong" in row["reason"]


def test_what_formats_cost():
    rows = [
        dict(shape="a", implementation=name, us=us)
        for name, us in (("qkv", 3.0), ("flash", 2.0), ("cudnn", 1.5), ("efficient", None))
    ]
    assert prefill.formats_cost(rows) == {"q, k, v": [], "q, kv": [], "qkv": [2.0]}


def test_the_grid_is_for_a_gpu(capsys):
    with pytest.raises(SystemExit):
        prefill.main(["--device", "cpu"])
    assert "--set tiny" in capsys.readouterr().err
