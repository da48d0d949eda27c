"""bench.in_model without a GPU: its layers, its arithmetic, its table and plot, and its command."""

import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # bench takes it off again unless leanattn is built in place

from bench import data, in_model, plot, readme, results, runner, shapes, tables, timeline, timing  # noqa: E402
from bench.implementations import IMPLEMENTATIONS, Prepared  # noqa: E402

CPU = torch.device("cpu")
TINY = shapes.tiny()


def implementation(name):
    return next(i for i in IMPLEMENTATIONS if i.name == name)


def model_of(shape, layers=3):
    """(Case, Model) in bfloat16."""
    case = data.Pool([shape], torch.bfloat16, CPU, 1 << 26).case(shape)
    elements = sum(map(math.prod, in_model.TRIAL.weights(shape)))
    weights = torch.randn(layers, elements, generator=torch.Generator().manual_seed(0))
    weights = (weights * in_model.TRIAL.hidden**-0.5).bfloat16()
    return case, in_model.Model(case, in_model.TRIAL, weights)


# --- Layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shapes.MODEL_SETS)
def test_the_weights_of_a_layer_are_more_than_an_l2_cache(name):
    """And about as many whatever heads a shape has."""
    for shape in shapes.MODEL_SETS[name]():
        count = sum(map(math.prod, in_model.MODEL.weights(shape)))
        assert 90e6 < 2 * count <= 92e6


def test_layers_have_weights_of_their_own_and_caches_in_turn():
    case, model = model_of(TINY[1], layers=len(model_of(TINY[1])[0].sets) + 1)
    assert len({layer.qkv.data_ptr() for layer in model.layers}) == len(model.layers)
    found = [id(layer.inputs) for layer in model.layers]
    assert found == [id(inputs) for inputs in (*case.sets, case.sets[0])]


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_a_layer_is_the_model_that_it_says(shape):
    """Step by step, with a decode that gives back what it was given, and its queries those of the
    first product."""
    _, model = model_of(shape)
    layer = model.layers[0]
    given = []

    def call(inputs):
        given.append(inputs)
        return inputs.q[..., : shape.head_dim_v].contiguous()

    model.x.normal_(generator=torch.Generator().manual_seed(0))
    x = model.x.clone()
    model.layer_with(Prepared(call))(layer)
    qkv = torch.nn.functional.rms_norm(x, x.shape[1:]) @ layer.qkv.T
    q = qkv[:, : shape.heads_q * shape.head_dim].view(
        shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim
    )
    assert torch.equal(given[0].q, q) and given[0].k_cache is layer.inputs.k_cache
    out = q[..., : shape.head_dim_v].reshape(model.tokens, -1)
    gate, up = (out @ layer.o.T @ layer.gate_up.T).chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * up) @ layer.down.T
    torch.testing.assert_close(model.x, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_many_layers_stay_finite(shape):
    """With a decode and without, in half precision too, which ends at 65504."""
    for dtype in (torch.bfloat16, torch.float16):
        case = data.Pool([shape], dtype, CPU, 1 << 26).case(shape)
        elements = sum(map(math.prod, in_model.TRIAL.weights(shape)))
        weights = torch.randn(24, elements, generator=torch.Generator().manual_seed(0))
        model = in_model.Model(
            case, in_model.TRIAL, (weights * in_model.TRIAL.hidden**-0.5).to(dtype)
        )
        prepared = implementation("leanattn").prepare(case)
        for step in (model.layer_with(prepared), model.layer_with(None)):
            for layer in model.layers:
                step(layer)
            assert model.x.isfinite().all()


@pytest.mark.filterwarnings("ignore:Flash attention")  # SDPA's reasons not to take a shape
@pytest.mark.parametrize("name", ["leanattn", "math", "flash", "flash-folded"])
def test_answers_are_right_on_queries_between_keys_and_values(name):
    answered = 0
    for shape in TINY:
        case, model = model_of(shape)
        try:
            with implementation(name).context():
                prepared = implementation(name).prepare(case)
                out = model.first_answer(prepared)
        except Exception:  # what it refuses alone, it refuses here
            continue
        if min(shape.lengths):  # SDPA gives NaN where there is no key
            assert data.truth(case).error(out) < data.TOLERANCE
        answered += 1
    assert answered >= (len(TINY) if name == "leanattn" else 2)


def test_who_takes_no_strided_queries_reads_its_own():
    for batch in (1, 2):
        case, model = model_of(shapes.uniform(batch, 4, 2, 64, 96))
        seen = []
        for takes_strided_q in (True, False):
            prepared = Prepared(lambda i: seen.append(i) or i.q, takes_strided_q=takes_strided_q)
            assert torch.equal(model.first_answer(prepared), case.sets[0].q)
        strided, packed = seen
        assert strided.q.is_contiguous() == (batch == 1)
        assert packed.q.is_contiguous() and (packed is case.sets[0]) == (batch == 2)


# --- Times ----------------------------------------------------------------------------------------


def test_a_round_begins_with_a_replay_that_is_not_timed(monkeypatch):
    """Then each graph once, the base first and last, though it is one graph."""
    log, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            log.append("event")
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        calls = 4

        def __init__(self, name, milliseconds):
            self.name, self.milliseconds = name, milliseconds

        def replay(self):
            log.append(self.name)
            clock[0] += self.milliseconds

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(timing, "WARM_SECONDS", 0)
    base = Graph("base", 4.0)
    times = timing.graph_times({"base": base, "a": Graph("a", 6.0), "after": base})
    assert {name: t.median for name, t in times.items()} == {
        "base": pytest.approx(1000), "a": pytest.approx(1500), "after": pytest.approx(1000)
    }  # fmt: skip
    last = len(log) - 1 - log[-2::-1].index("wait")
    timed = ["event", "base", "event", "event", "a", "event", "event", "base", "event"]
    assert log[last:] == ["base", *timed, "wait"]


def test_the_first_times_are_thrown_away(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "graph_times", lambda graphs: calls.append(graphs) or len(calls))
    bench = object.__new__(runner.Bench)
    bench.device, bench.has_timed = torch.device("cuda"), False
    assert bench.time({}, []) == 2 and bench.time({}, []) == 3


# --- Results --------------------------------------------------------------------------------------


def rows():
    """Two shapes with made-up times, for arithmetic only."""
    made = []
    small, large = shapes.uniform(1, 32, 8, 128, 1024), shapes.uniform(8, 32, 8, 128, 4096)
    for shape, floor, times in (
        (small, 4.0, {"leanattn": (7.0, 8.0), "cudnn": (9.0, 12.0), "cudnn-folded": (9.5, 10.0)}),
        (large, 31.0, {"leanattn": (34.0, 36.0), "cudnn": (36.0, 38.0), "fa3": (35.0, 35.0)}),
    ):
        columns = results.shape_columns("model", shape) | {"run": 0}
        made.append(results.Row(**columns, implementation="floor", us=floor))
        for name, (alone, added) in times.items():
            made.append(
                results.Row(
                    **columns, implementation=name, us=alone, layers=8, base_us=40.0,
                    base_after_us=41.0, layer_us=40.5 + added, layer_us_quartile1=40.0,
                    layer_us_quartile3=60.0,
                )
            )  # fmt: skip
    return made


def test_what_a_decode_adds_is_the_difference_from_both_bases():
    row = rows()[1]
    assert row.model_us == pytest.approx(8.0)
    assert replace(row, layer_us=None).model_us is None
    entry = results.entries(rows())["model"][0]
    assert entry.bases == (40.0, 41.0) and entry.in_model["leanattn"] == pytest.approx(8.0)


def test_a_peer_called_in_two_ways_counts_once():
    small, large = results.entries(rows())["model"]
    assert results.best_calls(small) == {"leanattn": "leanattn", "cudnn": "cudnn-folded"}
    assert results.best_calls(large)["cudnn"] == "cudnn"


def test_the_summary():
    summary = results.model_summary(results.entries(rows())["model"])
    assert summary.peer_of_ours == pytest.approx(math.sqrt(10 / 8 * 35 / 36))
    assert summary.peer_count == 2
    ((shape, ratio, peer),) = summary.behind
    assert (shape, peer) == ("b8 32/8 D128 s4096 bshd", "fa3") and ratio == pytest.approx(36 / 35)


def test_a_difference_below_nothing_is_no_ratio():
    """The noise of a CPU."""
    made = [replace(row, layer_us=30.0) if row.implementation == "fa3" else row for row in rows()]
    assert results.model_summary(results.entries(made)["model"]).behind == []


def test_the_table(capsys):
    header, lines = tables.model_table(results.entries(rows())["model"])
    assert header == ["shape", "MiB", "floor", "base", "leanattn", "cudnn", "fa3"]
    assert lines[0][1:] == ["4", "4.00", "40.0 / 41.0", "3.0 / 4.0", "5.5 / 6.0", ""]
    assert lines[1][1:] == ["128", "31.00", "40.0 / 41.0", "3.0 / 5.0", "5.0 / 7.0", "4.0 / 4.0"]
    tables.print_model_tables(rows())
    last = capsys.readouterr().out.strip().splitlines()[-2:]
    assert last[0] == "model: in the model, fastest peer/ours: 1.102 (2)"
    assert last[1].endswith("1 of 2: b8 32/8 D128 s4096 bshd 1.03 (fa3)")


def test_a_file_and_its_plot(tmp_path):
    pytest.importorskip("matplotlib")
    writer = results.Writer(tmp_path / "model.csv", {"device": "none"})
    writer.write(rows())
    writer.close()
    assert results.read(tmp_path / "model.csv") == ({"device": "none"}, rows())
    assert plot.main([str(tmp_path / "model.csv"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "in_model.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "| 3.0 / 5.0 |" in text and "fastest peer/ours: 1.102" in text


# --- The command ----------------------------------------------------------------------------------

ARGUMENTS = ["--set", "tiny", "--device", "cpu", "--layers", "2"]


def test_a_run_on_the_cpu(tmp_path, capsys):
    path = tmp_path / "tiny.csv"
    chosen = ["--shape", "s96", "--impl", "leanattn,leanattn-no_lengths,math,fa3"]
    assert in_model.main([*ARGUMENTS, *chosen, "--csv", str(path), "--commit", "abc"]) == 0
    header, written = results.read(path)
    assert header["commit"] == "abc" and len(header["library sha256"]) == 64
    expected = [shape.name for shape in TINY if "s96" in shape.name]
    for name in ("leanattn", "math"):
        measured = [row for row in written if row.implementation == name]
        assert [row.shape for row in measured] == expected
        for row in measured:
            assert row.us and row.layer_us and row.base_us and row.base_after_us
            assert row.layers == 2 and row.error < data.TOLERANCE
    assert all(row.reason for row in written if row.us is None)
    out = capsys.readouterr().out
    assert "in a graph of decodes alone / in a model" in out


def test_no_figure_of_a_wrong_answer(tmp_path, monkeypatch, capsys):
    """Also where it is wrong on the queries of a model alone."""
    monkeypatch.setattr(
        in_model.Model, "first_answer", lambda self, prepared: torch.ones(2, 1, 4, 64)
    )
    path = tmp_path / "tiny.csv"
    arguments = [*ARGUMENTS, "--impl", "leanattn", "--shape", "4/4", "--csv", str(path)]
    in_model.main(arguments)
    _, (row,) = results.read(path)
    assert row.us and row.layer_us is None and row.reason.startswith("wrong answer")
    assert "wrong answer" in capsys.readouterr().out


def test_who_refuses_the_queries_of_a_model_says_why(tmp_path, monkeypatch):
    def refuse(self, prepared):
        raise RuntimeError("q must be contiguous")

    monkeypatch.setattr(in_model.Model, "first_answer", refuse)
    path = tmp_path / "tiny.csv"
    in_model.main([*ARGUMENTS, "--impl", "math", "--shape", "4/4", "--csv", str(path)])
    _, (row,) = results.read(path)
    assert row.layer_us is None and row.reason.endswith("of a model: q must be contiguous")


def test_the_timeline_has_the_kernels_marks():
    header = (ROOT / "csrc" / "core" / "params.h").read_text()
    marks = (ROOT / "csrc" / "cuda" / "kernel" / "timeline.h").read_text()
    marks = re.search(r"enum class Mark \{(.*?)\n\};", marks, re.DOTALL)[1]
    assert f"kMaxTimelineUnits = {timeline.MAX_UNITS};" in header
    assert f"kNumMarks = {len(timeline.MARKS)};" in header
    assert len(re.findall(r"^ *k\w+,", marks, re.MULTILINE)) == len(timeline.MARKS)


@pytest.mark.parametrize("arguments, message", [
    (["--set", "tiny", "--layers", "0"], "must be a number from 1 on, got '0'"),
    (["--device", "cpu"], "takes --set tiny alone"),
])  # fmt: skip
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        in_model.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_a_run_on_the_gpu(device, tmp_path):
    path = tmp_path / "tiny.csv"
    arguments = ["--set", "tiny", "--device", device, "--layers", "4"]
    arguments += ["--impl", "leanattn*,cudnn"]
    assert in_model.main([*arguments, "--csv", str(path)]) == 0
    _, written = results.read(path)
    measured = {row.shape for row in written if row.implementation == "leanattn" and row.layer_us}
    assert measured == {shape.name for shape in TINY}
    # Of shapes so small the difference of two times may be anything.
    assert all(math.isfinite(row.model_us) for row in written if row.layer_us)


# --- README ---------------------------------------------------------------------------------------


def test_the_figures_of_readme_are_those_of_the_results():
    """`python -m bench.readme` puts them there."""
    text = (ROOT / "README.md").read_text()
    assert readme.filled(text) == text


def test_behind_is_more_than_a_tie():
    def row(name, us):
        whole = {"layer_us": us, "base_us": 0.0, "base_after_us": 0.0}
        return replace(readme.by_shape(readme.PLAIN)[next(iter(readme.SHAPES))][name], **whole)

    rows = {name: row(name, 100.0) for name in ("leanattn", "cudnn", "fa3")}
    peers = readme.PEERS
    assert readme.fastest_peer(rows, peers) == 100.0 and not readme.is_behind(rows, peers)
    rows["fa3"] = row("fa3", 98.0)
    assert readme.fastest_peer(rows, peers) == 98.0 and readme.is_behind(rows, peers)
