"""The bench without a GPU: its shapes, its arithmetic, its files and plots, and its commands."""

import lzma
import math
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # bench takes it off again unless leanattn is built in place

from bench import (  # noqa: E402
    carried,
    data,
    decode,
    host_time,
    in_model,
    plot,
    results,
    runner,
    shapes,
    tables,
    timing,
    tune,
)
from bench.implementations import (  # noqa: E402
    IMPLEMENTATIONS,
    Refused,
    _takes,
    as_pages,
    environment,
    reason_of,
    try_call,
)

CPU = torch.device("cpu")


# --- Shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shapes.SETS)
def test_sets_are_well_formed(name):
    """Names are told apart, lengths fit, and a second making gives the same."""
    group = shapes.SETS[name]()
    assert len({shape.name for shape in group}) == len(group)
    assert group == shapes.SETS[name]()
    for shape in group:
        assert shape.heads_q % shape.heads_kv == 0
        assert all(n == 0 and "padded" in shape.name or n >= shape.seqlen_q for n in shape.lengths)
        assert shape.capacity >= shape.longest > 0
        assert shape.layout in ("bshd", "bhsd")
        assert shape.visible_elements <= shape.cache_elements
        assert 4 * shape.cache_elements <= 16 * shapes.GIB


def test_the_seed_grid_is_that_of_the_note():
    """47 of 48: 16 x 32 heads of 128 x 65536 tokens are 16 GiB."""
    group = shapes.seed()
    assert len(group) == 47 and all(shape.layout == "bhsd" for shape in group)
    sizes = [shape.visible_bytes / shapes.MIB for shape in group]
    assert min(sizes) == 2 and max(sizes) == 8192
    assert group[0].name == "b1 16/16 D64 s512 bhsd"
    assert not any(s.name.startswith("b16 32/32 D128 s65536") for s in group)


def test_bytes_by_hand():
    shape = shapes.Shape(8, 2, 64, (3, 10), "x")
    assert shape.visible_bytes == (3 + 10) * 2 * 64 * 2 * 2  # tokens, heads, D, bytes, K and V
    assert shape.cache_elements == 2 * 10 * 2 * 64  # padded to the longest
    assert shape.query_elements == 2 * 8 * 64
    assert shape.is_ragged and shape.context_ratio == 13 / 20
    paged = replace(shape, page_size=4)
    assert paged.pages == 1 + 3 and paged.cache_elements == 4 * 4 * 2 * 64
    assert paged.visible_bytes == shape.visible_bytes
    latent = replace(shape, latent_dim=32)
    assert latent.visible_bytes == shape.visible_bytes // 2 and latent.head_dim_v == 32
    assert replace(shape, is_float8=True).visible_bytes == shape.visible_bytes // 2


def test_short_rows_are_those_of_64_elements_between_other_heads():
    found = {s.name for s in shapes.gqa() if s.has_short_rows}
    assert found == {s.name for s in shapes.gqa() if "D64" in s.name and "bshd" in s.name
                     and s.heads_kv > 1}  # fmt: skip
    assert "b8 32/8 D64 s4096 bshd" in found and not any(s.has_short_rows for s in shapes.seed())


def test_the_sweep_has_the_ratios_that_it_names():
    sweep = [shape for shape in shapes.ragged() if "ratio" in shape.name]
    assert len(sweep) == 31
    for shape in sweep:
        assert shape.context_ratio == pytest.approx(float(shape.name.split()[-1]), rel=0.002)
        assert sum(length == shape.capacity for length in shape.lengths) >= 1


def test_a_ratio_that_one_sequence_exceeds_is_refused():
    with pytest.raises(AssertionError, match="alone exceeds"):
        shapes.with_ratio(4, 1000, 0.1)


def test_all_stands_for_the_main_sets():
    names = {name for name, _ in shapes.shapes_of(["all"])}
    assert names == {"seed", "gqa", "ragged", "paged", "spec"}
    names = {name for name, _ in shapes.shapes_of(["all"], shapes.MODEL_SETS)}
    assert names == {"model", "capacity", "general"}
    assert len(shapes.shapes_of(["seed", "tiny"])) == 47 + len(shapes.tiny())


def test_room_and_padding_add_no_bytes():
    shape = shapes.uniform(2, 8, 2, 64, 48)
    roomy = shapes.with_room(shape, 8)
    assert roomy.capacity == 8 * 48 and roomy.visible_bytes == shape.visible_bytes
    assert roomy.cache_elements == shape.cache_elements and roomy.overhang == 7 * 48 * 2 * 64
    assert shape.is_full and not roomy.is_full
    paged = shapes.with_room(shapes.in_pages(shape, 16), 8)
    assert paged.name == "b2 8/2 D64 s48 page 16 room x8" and paged.overhang == 0
    empty = shapes.padded(shape, 5)
    assert empty.lengths == (48, 48, 0, 0, 0) and empty.visible_bytes == shape.visible_bytes


def test_a_window_counts_what_its_queries_see():
    shape = replace(shapes.Shape(8, 2, 64, (3, 100), "x"), window=10)
    assert shape.visible_elements == (3 + 10) * 2 * 64
    assert replace(shape, seqlen_q=4).visible_elements == (3 + 13) * 2 * 64


def test_options_are_each_alone():
    group = shapes.masked(shapes.uniform(1, 8, 2, 64, 48))
    assert [sorted(s.features) for s in group] == [
        ["a window"], ["softcap"], ["sinks"], ["ALiBi"], [], []
    ]  # fmt: skip
    assert group[-2].seqlen_q == 4 and group[-1].has_query_offsets


# --- Tensors --------------------------------------------------------------------------------------


def cases(dtype=torch.float32):
    pool = data.Pool(shapes.tiny(), dtype, CPU, 1 << 26)
    return [pool.case(shape) for shape in shapes.tiny()]


def test_input_sets_share_no_memory():
    for case in cases():
        spans = sorted(
            (t.data_ptr(), t.data_ptr() + elements * t.element_size())
            for inputs in case.sets
            for t, elements in (
                (inputs.q, case.shape.query_elements),
                *((c, case.shape.cache_elements) for c in (inputs.k_cache, inputs.v_cache)),
            )[: 1 + case.shape.num_caches]
        )
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))


def test_the_floor_reads_what_is_visible():
    for case in cases():
        for inputs in case.sets:
            read = inputs.k_visible.numel() + inputs.v_visible.numel()
            assert read == case.shape.visible_bytes // case.shape.cache_bytes
            assert inputs.k_visible.data_ptr() == inputs.k_cache.data_ptr()


def test_a_pool_that_is_too_small_says_so():
    shape = shapes.uniform(1, 4, 4, 64, 96)
    pool = data.Pool([shape], torch.float32, CPU, limit_bytes=1000)
    with pytest.raises(MemoryError, match="the pool has"):
        pool.case(shape)


def test_lengths_are_given_unless_they_are_not_needed():
    for case in cases():
        assert case.cache_seqlens.tolist() == list(case.shape.lengths)
    pool = data.Pool(shapes.tiny(), torch.float32, CPU, 1 << 26)
    for shape in shapes.tiny():
        assert (pool.case(shape, with_lengths=False).cache_seqlens is None) == shape.is_full
    assert sum(shape.is_full for shape in shapes.tiny()) == 9


def test_room_is_no_memory_and_the_cache_is_as_it_says():
    """A roomy cache holds what the tight one holds, in the same memory; its table is wider."""
    tight = shapes.uniform(3, 4, 2, 64, 32)
    for shape in (tight, replace(tight, layout="bhsd"), shapes.in_pages(tight, 16)):
        roomy = shapes.with_room(shape, 4)
        pool = data.Pool([shape, roomy], torch.float32, CPU, 1 << 26)
        case, other = pool.case(shape), pool.case(roomy)
        assert len(case.sets) == len(other.sets)
        for a, b in zip(case.sets, other.sets):
            assert torch.equal(a.k_cache, b.k_cache[:, :32]) and a.k_cache.is_set_to(
                b.k_cache[:, :32]
            )
        if shape.page_size:
            assert other.block_table.shape == (3, 8)
            assert torch.equal(case.block_table, other.block_table[:, :2])
        else:
            assert other.sets[0].k_cache.shape[1] == 128


def test_pages_are_taken_once_and_unsorted():
    shape = next(s for s in shapes.paged() if s.page_size == 16 and s.is_ragged)
    table = data.unsorted_pages(shape)
    used = [row[: -(-n // 16)] for row, n in zip(table, shape.lengths)]
    order = torch.cat(used).tolist()
    assert sorted(order) == list(range(shape.pages)) and order != sorted(order)


def test_the_truth_is_sdpa():
    """Against torch's own attention, sequence by sequence, and it tells a wrong answer. Softcap and
    sinks, which SDPA has not, are by hand."""
    for case in cases():
        shape, inputs = case.shape, case.sets[0]
        expected = data.truth(case)
        out = inputs.q.new_zeros(*inputs.q.shape[:3], shape.head_dim_v)
        for seq, length in enumerate(shape.lengths):
            k, v = (data._sequence(case, c, seq) for c in (inputs.k_cache, inputs.v_cache))
            if length and not shape.features & {"softcap", "sinks"}:
                out[seq] = torch.nn.functional.scaled_dot_product_attention(
                    *(x.float().transpose(0, 1) for x in (inputs.q[seq], k, v)),
                    bias_by_hand(case, length), enable_gqa=True,
                ).transpose(0, 1)  # fmt: skip
            elif length:
                out[seq] = attention_by_hand(case, inputs.q[seq], k, v)
        assert expected.error(out) < 1e-5
        out[0, 0, 0] *= 1.5
        assert expected.error(out) > data.TOLERANCE


def bias_by_hand(case, length):
    """`[Hq, Sq, L]`"""
    shape = case.shape
    bias = torch.zeros(shape.heads_q, shape.seqlen_q, length)
    for i in range(shape.seqlen_q):
        p = length - shape.seqlen_q + i
        for j in range(length):
            if j > p or shape.window and j <= p - shape.window:
                bias[:, i, j] = -math.inf
            elif shape.has_alibi:
                bias[:, i, j] = -case.alibi_slopes * (p - j)
    return bias


def attention_by_hand(case, q, k, v):
    """One query, softcap or sinks, a head at a time."""
    shape, out = case.shape, []
    for head in range(shape.heads_q):
        kv_head = head // shape.group_size
        scores = k[:, kv_head].float() @ q[0, head].float() / math.sqrt(shape.head_dim)
        if shape.softcap:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        weights = scores.exp()
        total = weights.sum() + (case.sinks[head].exp() if shape.has_sinks else 0)
        out.append(weights @ v[:, kv_head].float() / total)
    return torch.stack(out)[None]


# --- Implementations ------------------------------------------------------------------------------


def test_what_runs_on_the_cpu_is_right():
    """Each answer or a reason; ours and SDPA's general backend answer all contiguous shapes."""
    answered = {}
    for case in cases(torch.bfloat16):
        expected = data.truth(case)
        for implementation in IMPLEMENTATIONS:
            if implementation.name.startswith(("flashinfer", "fa")):
                continue
            prepared, out = try_call(implementation, case)
            if prepared is None:
                assert isinstance(out, str) and out
            else:
                assert expected.error(out) < data.TOLERANCE, implementation.name
                answered.setdefault(implementation.name, set()).add(case.shape.name)
    for name in ("leanattn", "leanattn-counters", "leanattn-batch_invariant"):
        assert answered[name] == {shape.name for shape in shapes.tiny()}
    assert answered["leanattn-no_lengths"] == {s.name for s in shapes.tiny() if s.is_full}
    assert answered["math"] >= {
        s.name for s in shapes.tiny() if not s.page_size and not s.is_float8
        and s.features <= {"a window"} and min(s.lengths)
    }  # fmt: skip


def test_pages_hold_what_the_sequences_hold():
    """What FlashInfer is given, of paged caches and of contiguous ones cut into pages."""
    for case in cases():
        if case.shape.layout == "bhsd":
            with pytest.raises(Refused, match="takes pages only"):
                as_pages(case)
            continue
        if case.shape.is_float8:
            with pytest.raises(Refused, match="q's dtype"):
                as_pages(case)
            continue
        pages, cache = as_pages(case), case.sets[0].k_cache
        for seq, length in enumerate(case.shape.lengths):
            begin, end = pages.indptr[seq : seq + 2].tolist()
            taken = pages.view(cache)[pages.indices[begin:end].long()].flatten(0, 1)[:length]
            assert torch.equal(taken, data._sequence(case, cache, seq))
            assert (end - begin - 1) * pages.page_size + pages.last_page_len[seq] == length
            assert torch.equal(pages.table[seq, : end - begin], pages.indices[begin:end])


def test_what_a_caller_does_not_pass_on_is_refused():
    shape = replace(shapes.uniform(1, 4, 2, 64, 96), softcap=30.0, has_sinks=True)
    _takes(shape, "softcap", "sinks", "a window")
    with pytest.raises(Refused, match="called here without sinks, softcap"):
        _takes(shape, "a window")


def test_a_folder_of_peers(tmp_path, monkeypatch):
    """What lies there is found, decompressed once; what does not is no error."""
    for name in ("fa3", "find_flashinfer"):  # each keeps its first result
        monkeypatch.setattr(carried, name, getattr(carried, name).__wrapped__)
    monkeypatch.delenv("PEERS_DIR", raising=False)
    assert carried.fa3() is None and carried.hashes() == {}
    monkeypatch.setenv("PEERS_DIR", str(tmp_path / "peers"))
    monkeypatch.setattr(carried.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / f"{carried.FA3}.xz").write_bytes(lzma.compress(b"a library"))
    path = carried._file(carried.FA3)
    assert path.read_bytes() == b"a library" and carried._file(carried.FA3) == path
    assert list(carried.hashes()) == [f"{carried.FA3}.xz"]
    assert not list(path.parent.glob("*-*-*"))  # nothing half done is left
    package = tmp_path / "leanattn_test_peer.py"
    package.write_text("answer = 42\n")
    with tarfile.open(tmp_path / "peers" / carried.FLASHINFER, "w:xz") as archive:
        archive.add(package, "site.py")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    carried.find_flashinfer()
    assert (Path(sys.path[0]) / "site.py").exists()
    assert os.environ["FLASHINFER_DISABLE_JIT"] == "1"


def test_vllms_fa3_is_called_as_it_wants(monkeypatch):
    """Its arguments have no names: those that differ from shape to shape are where they belong."""
    calls = []

    class Library:
        def get_scheduler_metadata(self, *arguments):
            calls.append(arguments)
            return "metadata"

        def fwd(self, *arguments):
            calls.append(arguments)
            return [arguments[0]]

    monkeypatch.setattr(carried, "fa3", Library)
    fa3 = next(i for i in IMPLEMENTATIONS if i.name == "fa3")
    shape = shapes.with_room(shapes.in_pages(shapes.uniform(2, 4, 2, 64, 40), 16), 2)
    shape = replace(shape, window=7, softcap=30.0, has_sinks=True)
    case = data.Pool([shape], torch.bfloat16, CPU, 1 << 26).case(shape)
    inputs = case.sets[0]
    assert fa3.prepare(case).call(inputs) is inputs.q
    metadata, fwd = calls
    # A table of 5 pages, for 80 tokens; 40 tokens are in 3.
    assert metadata[:8] == (2, 1, 80, 4, 2, 64, 64, torch.bfloat16)
    assert metadata[8] is case.cache_seqlens and metadata[14:] == (
        16, 0, True, 6, 0, True, 0, None, 0
    )  # fmt: skip
    assert len(fwd) == 37 and fwd[1] is inputs.k_cache and fwd[11] is case.cache_seqlens
    assert fwd[13:15] == (80, case.block_table) and fwd[23:30] == (
        64**-0.5, True, 6, 0, 30.0, True, "metadata"
    )  # fmt: skip
    assert torch.equal(fwd[33], case.sinks.bfloat16())


def test_environment_is_put_back(monkeypatch):
    monkeypatch.delenv("LEANATTN_LOADER", raising=False)
    monkeypatch.setenv("LEANATTN_CHECK", "0")
    with environment(LEANATTN_LOADER="cp_async", LEANATTN_CHECK="1"):
        assert os.environ["LEANATTN_LOADER"] == "cp_async"
    assert "LEANATTN_LOADER" not in os.environ and os.environ["LEANATTN_CHECK"] == "0"


def test_reasons_are_one_line():
    assert reason_of(ModuleNotFoundError("No module named 'x'")).startswith("not importable")
    assert reason_of(ValueError("first\nsecond")) == "first"
    assert reason_of(KeyError()) == "KeyError"


def test_quartiles():
    times = timing.Times.of([4.0, 1.0, 2.0, 3.0, 5.0], calls=7)
    assert (times.quartile1, times.median, times.quartile3) == (2, 3, 4)
    assert (times.rounds, times.calls) == (5, 7)
    assert timing.Times.of([2.0], 1).quartile3 == 2


# --- Results --------------------------------------------------------------------------------------


def rows(set_name="gqa", factor=1.0, run=0):
    """Two shapes with made-up times, for arithmetic only."""
    made = []
    for shape, times in (
        (shapes.uniform(1, 32, 8, 128, 1024), dict(floor=4.0, leanattn=5.0, cudnn=10.0, fa3=8.0)),
        (shapes.uniform(1, 32, 8, 128, 65536), dict(floor=60.0, leanattn=75.0, cudnn=70.0)),
    ):
        columns = results.shape_columns(set_name, shape)
        for name, us in times.items():
            made.append(results.Row(**columns, implementation=name, run=run, us=us * factor))
        made.append(results.Row(**columns, implementation="fa2", run=run, reason='no, "really"'))
    return made


def test_geometric_means():
    assert results.geometric_mean([2, 8]) == pytest.approx(4)
    assert results.geometric_mean([]) is None
    summary = results.summary(results.entries(rows())["gqa"])
    assert summary.of_floor["leanattn"] == (pytest.approx(1.25), 2)
    assert summary.of_floor["cudnn"] == (pytest.approx(math.sqrt(10 / 4 * 70 / 60)), 2)
    assert summary.of_floor["fa3"] == (pytest.approx(2), 1)
    assert "floor" not in summary.of_floor and "fa2" not in summary.of_floor
    assert summary.best_peer_of_floor == pytest.approx(math.sqrt(8 / 4 * 70 / 60))
    assert summary.peer_of_ours == pytest.approx(math.sqrt(8 / 5 * 70 / 75))
    assert (summary.targets_met, summary.targets) == (1, 2)
    assert [e.row.longest for e in summary.worst] == [65536]
    assert [e.row.longest for e in summary.slower] == [65536]


@pytest.mark.parametrize(
    "us, floor, met",
    [(6.0, 4.0, True), (6.1, 4.0, False), (103.0, 100.0, True), (103.1, 100.0, False)],
)
def test_the_target(us, floor, met):
    assert results.meets_target(us, floor) is met


def test_runs_are_medians_with_their_spread():
    entry = results.entries(rows() + rows(factor=1.1, run=1) + rows(factor=1.2, run=2))["gqa"][0]
    assert entry.ours == pytest.approx(5.5) and entry.spread["leanattn"] == pytest.approx(0.2 / 1.1)


def test_a_file_gives_back_its_rows(tmp_path):
    header = {"device": "none", "command": "python -m bench.decode --set gqa"}
    writer = results.Writer(tmp_path / "x.csv", header)
    writer.write(rows()[:3])
    assert results.read(tmp_path / "x.csv") == (header, rows()[:3])  # though it is still open
    writer.write(rows()[3:])
    writer.close()
    assert results.read(tmp_path / "x.csv") == (header, rows())


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="its columns are others"):
        results.read(tmp_path / "x.csv")


def test_tables():
    header, lines = tables.times_table(results.entries(rows())["gqa"])
    assert header[:5] == ["shape", "MiB", "floor", "leanattn", "cudnn"]
    line = dict(zip(header, lines[0]))
    assert line["MiB"] == "4" and line["leanattn"] == "5.00" and line["TB/s"] == "0.84"
    assert line["time/floor"] == "1.25" and line["target"] == "met"
    assert line["best peer"] == "fa3" and line["peer/ours"] == "1.60"
    header, lines = tables.means_table(rows())
    line = dict(zip(header, lines[0]))
    assert line["leanattn"] == "1.250" and line["fa3"] == "2.000 (1)"
    assert line["target met"] == "1 of 2"
    assert tables.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"


# --- Commands -------------------------------------------------------------------------------------


def test_plots_are_written(tmp_path, capsys):
    """From the files of a run with all three kinds of figure in it."""
    pytest.importorskip("matplotlib")
    writer = results.Writer(tmp_path / "x.csv", {"device": "none"})
    for set_name in ("seed", "ragged", "gqa"):
        for shape in shapes.SETS[set_name]()[::3]:
            columns = results.shape_columns(set_name, shape)
            for i, name in enumerate(("floor", "leanattn", "cudnn")):
                us = (1 + i) * (shape.visible_bytes / 4e6 + 2)
                writer.write([results.Row(**columns, implementation=name, run=0, us=us)])
    writer.close()
    assert plot.main([str(tmp_path / "x.csv"), "--out", str(tmp_path / "out")]) == 0
    for name in ("latency", "ratio", "bandwidth"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| seed | 16 | 2.000 |" in capsys.readouterr().out
    assert "device: none" in (tmp_path / "out" / "tables.md").read_text()


def test_each_implementation_has_a_style():
    assert set(plot.STYLES) == {"floor", "floor-rows", *(i.name for i in IMPLEMENTATIONS)}
    assert len(set(plot.STYLES.values())) == len(plot.STYLES)


def test_a_run_on_the_cpu(tmp_path, capsys):
    """Every step but the GPU's: times, files, tables; peers that cannot be had say so once."""
    path = tmp_path / "tiny.csv"
    arguments = ["--set", "tiny", "--device", "cpu", "--impl", "leanattn,math,flashinfer"]
    assert decode.main([*arguments, "--csv", str(path), "--commit", "abc"]) == 0
    header, written = results.read(path)
    assert header["commit"] == "abc" and len(header["library sha256"]) == 64
    measured = {(row.shape, row.implementation) for row in written if row.us}
    assert ("b2 4/4 D64 s96 bhsd", "leanattn") in measured
    assert all(row.reason for row in written if row.us is None)
    assert all(row.error < data.TOLERANCE and row.step_us for row in written if row.us)
    out = capsys.readouterr().out
    if not any(row.us for row in written if row.implementation == "flashinfer"):
        assert out.count("flashinfer: not importable here") == 1


@pytest.mark.parametrize("arguments", [[], ["--no-lengths"]])
def test_lengths_are_given_by_default(monkeypatch, arguments):
    given, make_case = [], data.Pool.case

    def case(self, shape, **options):
        given.append(make_case(self, shape, **options))
        return given[-1]

    monkeypatch.setattr(data.Pool, "case", case)
    common = ["--set", "tiny", "--device", "cpu", "--impl", "leanattn", "--no-steps"]
    assert decode.main([*common, "--shape", "s96 bshd", *arguments]) == 0
    assert given and all(
        (case.cache_seqlens is None) == (bool(arguments) and case.shape.is_full) for case in given
    )


@pytest.mark.parametrize("text, index", [("cuda", 3), ("cuda:1", 1)])
def test_cuda_without_an_index_is_the_current_device(monkeypatch, text, index):
    """torch.cuda.set_device wants one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(runner.leanattn, "warmup", lambda device: sys.exit("warm"))
    with pytest.raises(SystemExit, match="warm"):
        decode.main(["--set", "tiny", "--device", text])
    assert chosen == [torch.device("cuda", index)]


def test_no_figure_of_a_wrong_answer(tmp_path, monkeypatch, capsys):
    """An implementation whose answer is wrong is not timed."""
    monkeypatch.setattr(data, "_attend", lambda case, seq: torch.ones(case.sets[0].q[seq].shape))
    path = tmp_path / "tiny.csv"
    arguments = ["--set", "tiny", "--device", "cpu", "--impl", "leanattn", "--shape", "4/4"]
    decode.main([*arguments, "--csv", str(path)])
    _, (row,) = results.read(path)
    assert row.us is None and row.step_us is None and row.reason.startswith("wrong answer")
    assert "wrong answer" in capsys.readouterr().out


@pytest.mark.parametrize("module", [decode, in_model, plot, tune, host_time])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as error:
        module.main(["--help"])
    assert error.value.code == 0 and f"python -m {module.__name__}" in capsys.readouterr().out


def test_it_measures_the_installed_leanattn():
    """`python -m` puts the root on the path, whose leanattn/ may have no compiled part."""
    process = subprocess.run(
        [sys.executable, "-m", "bench.decode", "--help"], cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert process.returncode == 0 and process.stderr == "" and "--set" in process.stdout


@pytest.mark.parametrize("arguments, message", [
    (["--set", "nothing"], "invalid choice: 'nothing'"),
    (["--set", "tiny", "--impl", "leanattn,none"], "'none' matches none of leanattn, "),
    (["--set", "seed", "--device", "cpu"], "takes --set tiny alone"),
    (["--set", "seed", "--device", "tpu"], "must be cpu, cuda or cuda:N, got 'tpu'"),
    (["--set", "seed", "--shard", "3/2"], "must be I/N with I from 1 to N, got '3/2'"),
    (["--set", "seed", "--runs", "0"], "must be a number from 1 on, got '0'"),
    (["--set", "seed", "--shape", "nowhere"], "no shape is left"),
])  # fmt: skip
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        decode.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [decode, in_model, tune, host_time])
def test_without_a_gpu_it_says_so(module):
    with pytest.raises(SystemExit, match=f"{module.__name__}: torch sees no CUDA device"):
        module.main(["--set", "seed"] if module is decode else [])


def test_the_sweep_forces_every_combination():
    found = tune.choices(["LEANATTN_LOADER", "LEANATTN_NUM_UNITS"], max_units=64)
    assert {"LEANATTN_LOADER": "cp_async", "LEANATTN_NUM_UNITS": "48"} in found
    assert len(found) == 2 * 3  # 64, 48 and 32 units
    assert tune.name_of(found[0]) == "loader=tma num_units=64"
    assert tune.loss({"chosen": 11.0, "num_units=64": 10.0, "num_units=48": 12.0}) == pytest.approx(
        0.1
    )
    assert tune.loss({"num_units=64": 10.0}) == 0


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_the_floors_read_any_layout(device):
    """They run on what the bench gives them, in a graph too; what they read is not to be seen."""
    device = torch.device(device, torch.cuda.current_device())
    sink = torch.zeros(1, dtype=torch.int32, device=device)
    group = [*shapes.tiny(), shapes.uniform(2, 8, 2, 64, 300), shapes.uniform(1, 4, 2, 256, 129)]
    pool = data.Pool(group, torch.bfloat16, device, 1 << 30)
    for shape in group:
        case = pool.case(shape)

        def floor(inputs):
            torch.ops.leanattn.read_floor(inputs.k_visible, inputs.v_visible, sink)

        def rows_floor(inputs):
            torch.ops.leanattn.read_rows_floor(inputs.k_cache, inputs.v_cache, sink)

        assert timing.graph_times({"floor": timing.CudaGraph(floor, case.sets)})["floor"].median > 0
        if shape.has_rows_floor and torch.cuda.get_device_capability(device) >= (9, 0):
            with environment(LEANATTN_LOADER="tma"):
                graph = timing.CudaGraph(rows_floor, case.sets)
            assert timing.graph_times({"rows": graph})["rows"].median > 0
    assert sink.item() == 0


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_what_the_floor_cannot_read(device):
    """Its copies are of 16 bytes and begin at multiples of them."""
    memory = torch.zeros(64, dtype=torch.float16, device=device)
    sink = torch.zeros(1, dtype=torch.int32, device=device)
    for part, message in (
        (memory[1:17], "a must begin on a 16-byte boundary, got address"),
        (memory[:17], "a must be a multiple of 16 bytes, got 34"),
        (memory[::2], r"a must be contiguous on CUDA, got strides \[2\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.leanattn.read_floor(part, memory, sink)


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_a_run_on_the_gpu(device, tmp_path):
    """`device` is "cuda", without an index, as it is by default."""
    path = tmp_path / "tiny.csv"
    assert decode.main(["--set", "tiny", "--device", device, "--csv", str(path)]) == 0
    _, written = results.read(path)
    measured = {(row.shape, row.implementation) for row in written if row.us}
    assert {
        ("b2 4/2 D64 s96 bshd", name) for name in ("floor", "floor-rows", "leanattn")
    } <= measured
