"""leanattn.schedule: the scheduler's table with names, as text and as a picture."""

import sys

import pytest
import torch

import leanattn
from leanattn.schedule import Schedule, Segment

RAGGED = dict(cache_seqlens=[300, 0, 1000], num_heads_q=4, num_heads_kv=2, head_dim=64)


def ragged(**options):
    """2 KV heads of 3 and of 8 tiles, and an empty sequence: 22 tiles."""
    return leanattn.schedule(**{**RAGGED, **options})


def test_fields():
    """Every field of a segment, by hand: shares of 8, 7 and 7 tiles of 3, 3, 8 and 8."""
    schedule = ragged(num_units=3)
    assert isinstance(schedule, Schedule)
    assert schedule.segments == (
        Segment(0, 0, 0, 0, 0, 3, 0, 3, first_unit=0, last_unit=0),
        Segment(0, 0, 1, 0, 0, 3, 0, 3, first_unit=0, last_unit=0),
        Segment(0, 2, 0, 0, 0, 2, 0, 8, first_unit=0, last_unit=1),
        Segment(1, 2, 0, 0, 2, 8, 0, 8, first_unit=0, last_unit=1),
        Segment(1, 2, 1, 0, 0, 1, 0, 8, first_unit=1, last_unit=2),
        Segment(2, 2, 1, 0, 1, 8, 0, 8, first_unit=1, last_unit=2),
    )
    assert schedule.lengths == (300, 0, 1000)
    assert (schedule.num_heads_kv, schedule.num_units, schedule.tile_tokens) == (2, 3, 128)


def test_properties():
    """What is counted, on the same schedule."""
    schedule = ragged(num_units=3)
    assert schedule.tiles_per_unit == [8, 7, 7] and schedule.num_tiles == 22
    assert schedule.imbalance == pytest.approx(8 / (22 / 3))
    assert schedule.num_items == 4 and schedule.num_cut_items == 2
    assert [[s.unit for s in parts] for parts in schedule.cut_items] == [[0, 1], [1, 2]]
    assert schedule.partials == [s for s in schedule.segments if s.seq == 2]
    assert schedule.segments_of(2) == [schedule.segments[-1]]


def test_it_cannot_be_changed():
    """A schedule says what the scheduler did, not what somebody made of it."""
    with pytest.raises(AttributeError):
        ragged().num_units = 7


def test_more_units_than_tiles():
    """Idle units are counted: they are what makes so small a batch uneven."""
    schedule = ragged(num_units=40)
    assert schedule.tiles_per_unit == [1] * 22 + [0] * 18
    assert schedule.imbalance == pytest.approx(40 / 22)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_to_do(lengths):
    """No tile at all."""
    schedule = ragged(cache_seqlens=lengths, num_units=4)
    assert schedule.segments == () and schedule.num_tiles == 0 and schedule.imbalance == 1.0
    assert schedule.text().count("idle") == 4


@pytest.mark.parametrize("head_dim, tokens", [(8, 128), (128, 128), (136, 64), (256, 64)])
def test_tile_tokens(head_dim, tokens):
    """The size of a tile, from the scheduler itself."""
    assert ragged(head_dim=head_dim).tile_tokens == tokens


def test_lengths_are_numbers_or_tensors():
    """The same schedule from each; an int64 tensor is the op's own error."""
    tensor = torch.tensor(RAGGED["cache_seqlens"], dtype=torch.int32)
    assert ragged(cache_seqlens=tensor) == ragged()
    assert ragged(cache_seqlens=tuple(tensor.tolist())) == ragged()
    with pytest.raises(RuntimeError, match="cache_seqlens"):
        ragged(cache_seqlens=tensor.long())


def test_lengths_are_clamped_to_the_capacity():
    """As decode does it, in the table and in `lengths`."""
    schedule = ragged(cache_seqlens=[300, -5, 1000], capacity=200)
    assert schedule.lengths == (200, 0, 200)
    assert schedule.num_tiles == 2 * 2 * 2


@pytest.mark.parametrize(
    "heads, head_dim, seqlen_q, cu_seqlens_q, blocks",
    [
        ((8, 1), 64, 1, None, 1),
        ((64, 1), 64, 1, None, 1),
        ((64, 1), 128, 2, None, 1),
        ((64, 1), 136, 2, None, 2),
        ((71, 1), 128, 1, None, 1),
        ((16, 1), 576, 1, None, 1),
        ((128, 1), 576, 1, None, 2),
        ((71, 1), 128, 2, None, 2),
        ((16, 1), 64, 1, [0, 0, 4], 2),
    ],
)
def test_rows_per_item(heads, head_dim, seqlen_q, cu_seqlens_q, blocks):
    """Blocks of packed rows of the last sequence, with the CUDA kernels' choice of rows."""
    schedule = leanattn.schedule(
        [10, 10], *heads, head_dim, seqlen_q=seqlen_q, cu_seqlens_q=cu_seqlens_q, num_units=1
    )
    assert max(s.row_block for s in schedule.segments) + 1 == blocks


def test_masks():
    """Tiles that no row sees are in nobody's share."""
    assert ragged(window_left=0).num_tiles == 4
    assert ragged(window_left=100).num_tiles < ragged(window_left=400).num_tiles < 22
    assert ragged(seqlen_q=200, causal=False, rows_per_item=64).num_tiles == 22 * 7


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(num_heads_q=5), "num_heads_q"),
        (dict(num_heads_kv=0), "num_heads_kv"),
        (dict(num_units=0), "num_units"),
        (dict(head_dim=584), "head_dim"),
        (dict(window_right=1), "window_right"),
        (dict(cu_seqlens_q=[0, 1]), "cu_seqlens_q"),
    ],
)
def test_mistakes_are_named(change, name):
    """The message says which argument."""
    with pytest.raises(RuntimeError, match=name):
        ragged(**change)


def test_text_with_a_line_a_unit():
    """Whole items in short, cut ones with their tiles and where they go on."""
    lines = ragged(num_units=3).text().splitlines()
    assert "22 tiles" in lines[0] and "2 items cut" in lines[1]
    assert lines[-3:] == [
        "   0      8  s0:h0-1 s2:h0[0,2)>",
        "   1      7  <s2:h0[2,8) s2:h1[0,1)>",
        "   2      7  <s2:h1[1,8)",
    ]


def test_text_with_a_cell_a_unit():
    """Letters, capitals for the second head, + where an item is cut, | where none is."""
    lines = ragged(num_units=40).text().splitlines()
    assert lines[-2:] == [
        " 0-21 |a+a+a|A+A+A|c+c+c+c+c+c+c+c|C+C+C+C+C+C+C+C|",
        "22-39 idle",
    ]


@pytest.mark.parametrize("num_units", [17, 132, 1000])
def test_text_is_100_columns_wide_and_short(num_units):
    """The demo's batch on a GPU, and more units than any has."""
    lengths = [17, 100000, 1000, 331, 65536, 4096, 129, 30000, 12345, 777, 50021, 8191]
    text = leanattn.schedule(lengths, 32, 8, 128, num_units=num_units).text()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert len(text.splitlines()) <= 4 + num_units // 9


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("num_units", [1, 2, 40, 132])
def test_plot_writes_a_png(num_units, tmp_path):
    """With no fixup, with one, with idle units, with many."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "schedule.png"
    ragged(num_units=num_units).plot(path)
    assert path.read_bytes().startswith(PNG)


def test_plot_of_nothing_and_of_very_much(tmp_path):
    """Neither an empty axis nor 4096 sequences, more than there are colours, is an error."""
    pytest.importorskip("matplotlib")
    for lengths in ([], [0], list(range(4096))):
        path = tmp_path / "schedule.png"
        ragged(cache_seqlens=lengths).plot(path)
        assert path.read_bytes().startswith(PNG)


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    """The error names the extra that brings it; importing leanattn needed none."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib.*\[demo\]"):
        ragged().plot(tmp_path / "schedule.png")


@pytest.mark.parametrize(
    "lengths", [[1.9], [2**31], [None], torch.zeros(1, 2, dtype=torch.int32)], ids=str
)
def test_what_are_no_lengths(lengths):
    with pytest.raises(RuntimeError, match="cache_seqlens must be"):
        leanattn.schedule(lengths, 4, 2, 64)


def test_windows_beyond_all_tokens():
    """decode takes any up to 2^63 - 1."""
    wide = leanattn.schedule([300], 4, 2, 64, causal=False, window_left=2**40, window_right=2**31)
    assert wide == leanattn.schedule([300], 4, 2, 64, causal=False)


def test_opcheck():
    """How many segments there are, a trace does not know."""
    lengths = torch.tensor([500, 30], dtype=torch.int32)
    arguments = (lengths, 2, 2, 600, 64, 4, 8)
    torch.library.opcheck(torch.ops.leanattn.schedule.default, arguments)
    segments_of = torch.compile(torch.ops.leanattn.schedule, backend="eager")
    assert torch.equal(segments_of(*arguments), torch.ops.leanattn.schedule(*arguments))
