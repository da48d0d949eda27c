"""The schedule of a decode call, to look at: the scheduler's own table, as text and as a picture.

`decode` makes its schedule on the device, from the lengths, in every call. This module asks the
same C++ functions (csrc/core/schedule.h) on the CPU; nothing here is on the path of a decode.

The partition is that of Stream-K (arXiv 2301.03598, section 4) applied to attention as in
LeanAttention (arXiv 2405.10480, section IV-C): the KV tiles of all items, item after item, form one
line, and each unit (a CTA; on the CPU a thread's turn) takes its stretch of it.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch

import leanattn._C  # noqa: F401  registers torch.ops.leanattn


def _rows_per_item(rows, head_dim):
    """What the CUDA kernels of sm_90 hold: the least that is enough, else the most there is."""
    if head_dim <= 128:
        choices = (8, 16, 32, 64, 128)
    elif head_dim <= 256:
        choices = (8, 16, 32, 64)
    else:
        choices = (16, 32, 64)
    return next((n for n in choices if n >= rows), choices[-1])


class Segment(NamedTuple):
    """Tiles [tile_begin, tile_end) of one item, done by one unit.

    An item is (seq, head, row_block): a sequence, a KV head, a block of packed query rows. It has
    the tiles [item_begin, item_end) of its sequence, and the units first_unit..last_unit, both
    inclusive, share it.
    """

    unit: int
    seq: int
    head: int
    row_block: int
    tile_begin: int
    tile_end: int
    item_begin: int
    item_end: int
    first_unit: int
    last_unit: int

    @property
    def item(self):
        return self.seq, self.head, self.row_block

    @property
    def num_tiles(self):
        return self.tile_end - self.tile_begin

    @property
    def is_whole(self):
        """Whether the unit has the whole item, so that it leaves no partial."""
        return self.tile_begin == self.item_begin and self.tile_end == self.item_end


@dataclass(frozen=True)
class Schedule:
    """Who does what in one decode call; made by `leanattn.schedule`.

    Attributes:
        segments: every `Segment`, in the order of the units and of the line.
        lengths: tokens of each sequence, clamped to the capacity.
        num_heads_kv: KV heads.
        num_units: units that there are, idle ones included.
        tile_tokens: tokens a tile.
    """

    segments: tuple
    lengths: tuple
    num_heads_kv: int
    num_units: int
    tile_tokens: int

    @property
    def num_tiles(self):
        """Tiles of all items together: the length of the line."""
        return sum(s.num_tiles for s in self.segments)

    @property
    def tiles_per_unit(self):
        """Tiles that each unit does: a list of num_units numbers, 0 for an idle unit."""
        tiles = [0] * self.num_units
        for s in self.segments:
            tiles[s.unit] += s.num_tiles
        return tiles

    @property
    def imbalance(self):
        """The largest share over the mean share, idle units included: 1.0 is a perfect split."""
        return max(self.tiles_per_unit) * self.num_units / self.num_tiles if self.segments else 1.0

    @property
    def num_items(self):
        """Items that have a tile; those whose rows see no key are in nobody's share."""
        return len({s.item for s in self.segments})

    @property
    def cut_items(self):
        """The items that several units share: a list of lists of segments, in line order."""
        cut = sorted((s for s in self.segments if not s.is_whole), key=lambda s: (s.item, s.unit))
        return [list(parts) for _, parts in itertools.groupby(cut, key=lambda s: s.item)]

    @property
    def num_cut_items(self):
        """Items that need a fixup."""
        return len(self.cut_items)

    @property
    def partials(self):
        """The segments that end as a partial, an unfinished softmax state for the fixup."""
        return [s for s in self.segments if not s.is_whole]

    def segments_of(self, unit):
        """The segments of one unit, in line order."""
        return [s for s in self.segments if s.unit == unit]

    def summary(self):
        """What the schedule amounts to, in one sentence a line."""
        tiles, cut = self.tiles_per_unit, self.cut_items
        fixup = "no item is cut, no fixup"
        if cut:
            most = max(len(parts) for parts in cut)
            fixup = (
                f"{_count(len(cut), 'item')} cut into {len(self.partials)} partials, "
                f"at most {most} an item"
            )
        return (
            f"{_count(len(self.lengths), 'sequence')}, {_count(self.num_heads_kv, 'KV head')}: "
            f"{_count(self.num_items, 'item')}, {_count(self.num_tiles, 'tile')} of "
            f"{self.tile_tokens} tokens on {_count(self.num_units, 'unit')}\n"
            f"{min(tiles)} to {max(tiles)} tiles a unit, imbalance {self.imbalance:.3f}; {fixup}"
        )

    def text(self):
        """The schedule in a few lines of text, at most 100 columns wide where units are many.

        Up to 16 units have a line each; beyond that each is a cell of 8 letters.
        """
        return "\n".join([self.summary(), *(_lines if self.num_units <= 16 else _cells)(self)])

    def plot(self, path):
        """Draws the schedule into a PNG file: units down, tiles across, one colour a sequence.

        Neighbouring heads of a sequence have different shades. A black edge is a cut through an
        item; at the right, the dots on one line are the partials that one fixup merges.

        Args:
            path: where to write.

        Raises:
            ImportError: without matplotlib, naming the extra that brings it.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Schedule.plot needs matplotlib: `pip install matplotlib`, or install leanattn "
                "with its extra: `pip install --no-build-isolation '.[demo]'`"
            ) from error
        _draw(self, Figure).savefig(path, format="png", dpi=150)


def schedule(
    cache_seqlens,
    num_heads_q,
    num_heads_kv,
    head_dim,
    *,
    seqlen_q=1,
    capacity=None,
    cu_seqlens_q=None,
    causal=True,
    window_left=-1,
    window_right=-1,
    num_units=132,
    rows_per_item=None,
):
    """The stream-K schedule that `decode` would make for these lengths, as a `Schedule`.

    Stream-K (arXiv 2301.03598) over the KV tiles of a batch, as LeanAttention (arXiv 2405.10480)
    has it. Where items are alike the CUDA kernels may keep them whole or share them out within
    clusters instead (csrc/plan/cost_model.h). For tests, tools and pictures: `decode` needs no call
    of this.

    Args:
        cache_seqlens: tokens of each sequence: numbers, or an int32 tensor `[B]` of any device
            (a CUDA tensor is copied to the host, which waits for it).
        num_heads_q, num_heads_kv: heads; the first is a multiple of the second.
        head_dim: the larger of K's and V's head dims.
        seqlen_q: queries a sequence.
        capacity: tokens that the cache holds a sequence; default: the longest of cache_seqlens.
        cu_seqlens_q: numbers or int32 `[B + 1]`, where each sequence's queries begin, instead of
            seqlen_q.
        causal, window_left, window_right: as in `decode`; tiles that no row sees are in no share.
        num_units: how many share the work: on CUDA the number of SMs (an H200 has 132), on the CPU
            `torch.get_num_threads()`.
        rows_per_item: packed query rows (queries x heads of a group) that an item holds at most;
            default: the choice of the CUDA kernels of sm_90, the least of 8, 16, 32, 64 and, up to
            head dim 128, 128 (beyond head dim 256: of 16, 32 and 64) that holds a sequence's
            rows (their average, with cu_seqlens_q), else the largest. The CPU and sm_80 have at
            most 64, sm_80 beyond head dim 256 at most 16, in tiles of 32 tokens there, not 64.

    Raises:
        RuntimeError: naming the argument, what was given and what is allowed.
    """
    if num_heads_kv < 1 or num_heads_q < 1 or num_heads_q % num_heads_kv:
        raise RuntimeError(
            f"leanattn::schedule: num_heads_q must be a multiple of num_heads_kv, {num_heads_kv}, "
            f"got {num_heads_q}"
        )
    lengths = _int32("cache_seqlens", cache_seqlens)
    offsets = None if cu_seqlens_q is None else _int32("cu_seqlens_q", cu_seqlens_q)
    group_size = num_heads_q // num_heads_kv
    if capacity is None:
        capacity = max([0, *lengths.flatten().tolist()])
    if rows_per_item is None:
        queries = seqlen_q
        if offsets is not None and offsets.numel():
            queries = -(-max(0, int(offsets[-1])) // max(1, lengths.numel()))
        rows_per_item = _rows_per_item(queries * group_size, head_dim)
    table = torch.ops.leanattn.schedule(
        lengths, num_heads_kv, group_size, capacity, head_dim, num_units, rows_per_item, seqlen_q,
        offsets, causal, window_left, window_right,
    )  # fmt: skip
    return Schedule(
        segments=tuple(Segment(*row) for row in table.tolist()),
        lengths=tuple(lengths.clamp(0, capacity).tolist()),
        num_heads_kv=num_heads_kv,
        num_units=num_units,
        tile_tokens=_tile_tokens(head_dim),
    )


@torch.library.register_fake("leanattn::schedule")
def _(cache_seqlens, *args, **kwargs):
    num_segments = torch.library.get_ctx().new_dynamic_size()
    return cache_seqlens.new_empty((num_segments, len(Segment._fields)), dtype=torch.int64)


def _int32(name, values):
    # A tensor keeps its dtype, which the op checks.
    if isinstance(values, torch.Tensor):
        return values.cpu()
    values = list(values)
    for value in values:
        if not hasattr(value, "__index__") or not -(2**31) <= value < 2**31:
            raise RuntimeError(
                f"leanattn::schedule: {name} must be integers of 32 bits, got {value!r}"
            )
    return torch.tensor(values, dtype=torch.int32)


def _tile_tokens(head_dim):
    # Asked of the scheduler: into how many tiles does it cut one item of so many tokens?
    tokens = 1 << 16
    length = torch.tensor([tokens], dtype=torch.int32)
    row = torch.ops.leanattn.schedule(length, 1, 1, tokens, head_dim, 1, 64).tolist()[0]
    return tokens // Segment(*row).item_end


def _count(n, noun):
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# --- Text -----------------------------------------------------------------------------------------


def _lines(schedule):
    """One line a unit: sequences (s) and KV heads (h); a cut item with its tiles, and < or > on the
    side where another unit has the rest."""
    yield "unit  tiles  s: sequence, h: KV heads; a cut item with [tiles), and < > where it goes on"
    for unit in range(schedule.num_units):
        segments = schedule.segments_of(unit)
        parts = []
        for seq, run in itertools.groupby(segments, key=lambda s: s.seq if s.is_whole else None):
            parts += [_cut_text(s) for s in run] if seq is None else [_whole_text(list(run))]
        tiles = sum(s.num_tiles for s in segments)
        yield f"{unit:4}  {tiles:5}  {' '.join(parts) or 'idle'}"


def _whole_text(run):
    heads = sorted({s.head for s in run})
    span = f"{heads[0]}" if len(heads) == 1 else f"{heads[0]}-{heads[-1]}"
    return f"s{run[0].seq}:h{span}"


def _cut_text(s):
    before = "<" if s.tile_begin > s.item_begin else ""
    after = ">" if s.tile_end < s.item_end else ""
    return f"{before}s{s.seq}:h{s.head}[{s.tile_begin},{s.tile_end}){after}"


_CELL = 8  # letters at most
_COLUMNS = 100


def _cells(schedule):
    """A cell a unit, each letter an equal part of the largest share: which sequence, in capitals
    for every other head; the border to the next unit is + where it cuts an item."""
    tiles_per_unit = schedule.tiles_per_unit
    largest = max(tiles_per_unit)
    letters_a_cell = max(1, min(_CELL, largest))
    step = max(1.0, largest / letters_a_cell)
    yield (
        f"A letter: {step:.3g} tile{'s' * (step > 1)} of sequence 0 (a), 1 (b), ...; capitals: "
        "every other head; border +: a cut item"
    )
    cells = [" " * letters_a_cell] * schedule.num_units
    borders = ["|"] * schedule.num_units
    for unit, segments in itertools.groupby(schedule.segments, lambda s: s.unit):
        segments = list(segments)
        letters = [_letter(s) for s in segments for _ in range(s.num_tiles)]
        samples = [int((i + 0.5) * step) for i in range(letters_a_cell)]
        cells[unit] = "".join(letters[i] if i < len(letters) else " " for i in samples)
        if segments[-1].tile_end < segments[-1].item_end:
            borders[unit] = "+"
    busy = max((unit + 1 for unit, tiles in enumerate(tiles_per_unit) if tiles), default=0)
    width = len(str(schedule.num_units - 1))
    cells_a_line = (_COLUMNS - 2 * width - 3) // (letters_a_cell + 1)
    for first in range(0, busy, cells_a_line):
        line = borders[first - 1] if first else "|"
        last = min(first + cells_a_line, busy)
        for cell, border in zip(cells[first:last], borders[first:last]):
            line += cell + border
        yield f"{first:{width}}-{last - 1:<{width}} {line}"
    if busy < schedule.num_units:
        yield f"{busy:{width}}-{schedule.num_units - 1} idle"


def _letter(s):
    letter = "abcdefghijklmnopqrstuvwxyz"[s.seq % 26]
    return letter.upper() if (s.head + s.row_block) % 2 else letter


# --- Picture --------------------------------------------------------------------------------------

# One a sequence, again from the first after the last; the other heads are lighter.
_COLOURS = (
    "#2f6fb0", "#e07b1f", "#3f9142", "#c23b3b", "#7d5ba6", "#2aa1a8",
    "#d6689f", "#9a9a24", "#8a5a44", "#27407a", "#dcae1d", "#8e2a6b",
)  # fmt: skip
_LIGHTER = 0.42  # of white

# Inches.
_WIDTH, _LEFT, _RIGHT = 11.0, 0.65, 0.75
_HEAD, _LINE, _GAP, _FOOT = 0.95, 0.42, 0.75, 0.55
_LEGEND_ROW, _LEGEND_COLUMNS = 0.18, 6


def _colour(s):
    base = _COLOURS[s.seq % len(_COLOURS)]
    white = _LIGHTER * ((s.head + s.row_block) % 2)
    channels = (int(base[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return tuple(c + (1 - c) * white for c in channels)


def _draw(schedule, figure_class):
    row = min(0.42, max(0.07, 8.0 / schedule.num_units))  # inches
    shares_height = min(40.0, row * schedule.num_units)
    legend = _legend_entries(schedule)
    foot = _FOOT + _LEGEND_ROW * -(-len(legend) // _LEGEND_COLUMNS)
    height = _HEAD + _LINE + _GAP + shares_height + foot
    figure = figure_class(figsize=(_WIDTH, height))

    def axes(left, bottom, width, tall, **options):
        place = (left / _WIDTH, bottom / height, width / _WIDTH, tall / height)
        return figure.add_axes(place, **options)

    width = _WIDTH - _LEFT - _RIGHT
    line = axes(_LEFT, height - _HEAD - _LINE, width, _LINE)
    shares = axes(_LEFT, foot, width, shares_height)
    fixups = axes(_WIDTH - _RIGHT + 0.1, foot, _RIGHT - 0.2, shares_height, sharey=shares)
    figure.text(_LEFT / _WIDTH, 1 - 0.15 / height, schedule.summary(), fontsize=9, va="top")
    _draw_line(line, schedule)
    _draw_shares(shares, schedule, row)
    _draw_fixups(fixups, schedule, row)
    if legend:
        figure.legend(
            handles=legend, ncols=_LEGEND_COLUMNS, fontsize=7, frameon=False, loc="upper left",
            bbox_to_anchor=(_LEFT / _WIDTH, (foot - 0.4) / height), borderaxespad=0, borderpad=0,
        )  # fmt: skip
    return figure


def _draw_line(axes, schedule):
    """All items end to end, and where the units' shares are cut from it."""
    boxes, end = [], 0
    for s in schedule.segments:
        begin, end = end, end + s.num_tiles
        boxes.append((begin, end, 0, 1, _colour(s)))
    _add_boxes(axes, boxes)
    cuts = list(itertools.accumulate(t for t in schedule.tiles_per_unit if t))[:-1]
    axes.vlines(cuts, 0, 1, color="black", linewidth=0.7)
    axes.set(xlim=(0, max(1, end)), ylim=(0, 1), yticks=[])
    _decorate(axes, "The line of tiles. Black: where it is cut into shares.")


def _draw_shares(axes, schedule, row):
    from matplotlib.collections import LineCollection

    boxes, cuts = [], []
    ends = [0] * schedule.num_units
    tiles_per_unit = schedule.tiles_per_unit
    largest = max(1, *tiles_per_unit)
    for s in schedule.segments:
        begin = ends[s.unit]
        end = ends[s.unit] = begin + s.num_tiles
        top, bottom = s.unit - 0.42, s.unit + 0.42
        boxes.append((begin, end, top, bottom, _colour(s)))
        if s.tile_begin > s.item_begin:
            cuts.append([(begin, top), (begin, bottom)])
        if s.tile_end < s.item_end:
            cuts.append([(end, top), (end, bottom)])
        if row > 0.15 and s.num_tiles > 0.05 * largest:
            light = (s.head + s.row_block) % 2
            axes.text((begin + end) / 2, s.unit, f"s{s.seq} h{s.head}", fontsize=6.5, ha="center",
                      va="center", color="black" if light else "white", clip_on=True)  # fmt: skip
    _add_boxes(axes, boxes)
    axes.add_collection(LineCollection(cuts, colors="black", linewidths=1.8, clip_on=False))
    for unit, tiles in enumerate(tiles_per_unit):
        if tiles == 0 and row > 0.1:
            axes.text(0.005 * largest, unit, "idle", fontsize=6.5, va="center", color="gray")
    axes.set(xlim=(0, largest), ylim=(schedule.num_units - 0.5, -0.5))
    axes.set_xlabel(f"tiles of {schedule.tile_tokens} tokens", fontsize=8)
    axes.set_ylabel("unit: a CTA, or a thread's turn on the CPU" if row * schedule.num_units > 3
                    else "unit", fontsize=8)  # fmt: skip
    axes.yaxis.get_major_locator().set_params(integer=True)
    _decorate(axes, "Each unit's share. Heads in two shades. Black edge: a cut through an item.")


def _draw_fixups(axes, schedule, row):
    """A dot a partial; a line joins those of one item. Items that follow each other share a unit,
    so they have two lanes."""
    from matplotlib.collections import LineCollection

    lines, dots = [], []
    for lane, parts in zip(itertools.cycle((0, 1)), schedule.cut_items):
        lines.append([(lane, parts[0].unit), (lane, parts[-1].unit)])
        dots += [(lane, s.unit) for s in parts]
    axes.add_collection(LineCollection(lines, colors="black", linewidths=0.9))
    axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color="black",
              markersize=min(4.5, 36 * row))  # fmt: skip
    axes.set(xlim=(-0.8, 1.8))
    axes.set_title("Fixups", fontsize=8, loc="center")
    axes.axis("off")


def _legend_entries(schedule):
    """Nothing where there are more sequences than one can tell apart."""
    from matplotlib.patches import Patch

    first = {s.seq: s for s in reversed(schedule.segments)}
    if len(first) > 2 * len(_COLOURS):
        return []
    entries = []
    for seq in sorted(first):
        colour = _colour(first[seq]._replace(head=0, row_block=0))
        entries.append(Patch(color=colour, label=f"s{seq}: {schedule.lengths[seq]:,} tokens"))
    return entries


def _add_boxes(axes, boxes):
    """boxes: (left, right, top, bottom, colour)."""
    from matplotlib.collections import PolyCollection

    corners = [[(l, t), (r, t), (r, b), (l, b)] for l, r, t, b, _ in boxes]  # noqa: E741
    colours = [box[4] for box in boxes]
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="none"))


def _decorate(axes, title):
    axes.set_title(title, fontsize=8, loc="left", pad=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
