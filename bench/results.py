"""Measured rows, their CSV files, and what follows from them. No torch here."""

import csv
import math
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from typing import Optional

FLOOR = "floor"
ROWS_FLOOR = "floor-rows"  # the same bytes by the rows of the layout, head after head
OURS = "leanattn"


@dataclass
class Row:
    """One implementation on one shape, measured once. Times are of one call, in microseconds."""

    set: str
    shape: str
    batch: int
    heads_q: int
    heads_kv: int
    head_dim: int
    seqlen_q: int
    layout: str  # bshd, bhsd, or paged
    page_size: int  # 0: contiguous
    longest: int  # tokens of the longest sequence
    tokens: int  # of all sequences
    mib: float  # of visible K and V rows, each once
    implementation: str
    run: int
    us: Optional[float] = None  # median; none where it was not measured
    us_quartile1: Optional[float] = None
    us_quartile3: Optional[float] = None
    rounds: Optional[int] = None
    calls: Optional[int] = None  # in a round
    step_us: Optional[float] = None  # an eager step by the wall clock, host and plan included
    layers: Optional[int] = None  # of the model that it was measured in, if it was
    layer_us: Optional[float] = None  # of that with this decode in it, median
    layer_us_quartile1: Optional[float] = None
    layer_us_quartile3: Optional[float] = None
    base_us: Optional[float] = None  # of that without any decode, first in each round
    base_after_us: Optional[float] = None  # and again, last in each round
    error: Optional[float] = None  # norm of the difference from fp32 over the norm of that
    reason: str = ""  # why it was not measured

    @property
    def model_us(self):
        """What the decode adds to a layer of a model."""
        if self.layer_us is None:
            return None
        return self.layer_us - (self.base_us + self.base_after_us) / 2


def shape_columns(set_name, shape):
    """The columns of `Row` that a bench.shapes.Shape fills."""
    return dict(
        set=set_name,
        shape=shape.name,
        batch=shape.batch,
        heads_q=shape.heads_q,
        heads_kv=shape.heads_kv,
        head_dim=shape.head_dim,
        seqlen_q=shape.seqlen_q,
        layout="paged" if shape.page_size else shape.layout,
        page_size=shape.page_size or 0,
        longest=shape.longest,
        tokens=sum(shape.lengths),
        mib=shape.visible_bytes / 2**20,
    )


# --- Files ----------------------------------------------------------------------------------------


class Writer:
    """A CSV file that begins with `# key: value` lines and holds each row once it is there."""

    def __init__(self, path, header):
        self.file = open(path, "w", newline="")
        for key, value in header.items():
            self.file.write(f"# {key}: {value}\n")
        self.csv = csv.DictWriter(self.file, [f.name for f in fields(Row)], lineterminator="\n")
        self.csv.writeheader()
        self.file.flush()

    def write(self, rows):
        for row in rows:
            self.csv.writerow({key: _text(value) for key, value in asdict(row).items()})
        self.file.flush()

    def close(self):
        self.file.close()


def _text(value):
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def read(path):
    """(header, rows) of such a file."""
    with open(path, newline="") as file:
        lines = file.read().splitlines()
    comments = [line[2:].split(": ", 1) for line in lines if line.startswith("# ")]
    header = {key: value for key, value in comments}
    table = csv.DictReader(line for line in lines if not line.startswith("# "))
    if table.fieldnames != [f.name for f in fields(Row)]:
        raise ValueError(f"{path} is no result file of this bench: its columns are others")
    return header, [
        Row(**{f.name: _parsed(f, line[f.name]) for f in fields(Row)}) for line in table
    ]


def _parsed(column, text):
    if column.type in (int, float, str):
        return column.type(text)
    kind = int if column.type == Optional[int] else float
    return kind(text) if text else None


# --- Shape by shape -------------------------------------------------------------------------------


@dataclass
class Entry:
    """A shape with the time of each implementation, the median over runs, in microseconds."""

    row: Row  # any of the shape's, for its columns
    times: dict = field(default_factory=dict)  # implementation (the floor too) -> us
    steps: dict = field(default_factory=dict)  # implementation -> us of an eager step
    in_model: dict = field(default_factory=dict)  # implementation -> us that it adds to a layer
    bases: tuple = ()  # us of a layer without a decode: first in the rounds, and last
    spread: dict = field(default_factory=dict)  # implementation -> (max - min) / median over runs

    @property
    def floor(self):
        return self.times.get(FLOOR)

    @property
    def ours(self):
        return self.times.get(OURS)

    @property
    def best_peer(self):
        """(name, us), or None where no peer took the shape."""
        return min(peers_of(self.times).items(), key=lambda item: item[1], default=None)

    @property
    def ours_of_floor(self):
        return _ratio(self.ours, self.floor)

    @property
    def peer_of_ours(self):
        return _ratio(self.best_peer and self.best_peer[1], self.ours)

    @property
    def meets_target(self):
        """None where it cannot be told."""
        return meets_target(self.ours, self.floor) if self.ours and self.floor else None

    def terabytes(self, us):
        """TB/s"""
        return self.row.mib * 2**20 / us / 1e6


def meets_target(us, floor):
    """The target of leanattn: within 3% or 2 us of the read floor."""
    return us <= max(1.03 * floor, floor + 2.0)


def peers_of(times):
    return {name: us for name, us in times.items() if not name.startswith((OURS, FLOOR))}


def _ratio(a, b):
    return a / b if a and b else None


def entries(rows):
    """{set: [Entry]}, in the order of the rows."""
    grouped = defaultdict(list)
    for row in rows:
        grouped[row.set, row.shape].append(row)
    result = defaultdict(list)
    for (set_name, _), group in grouped.items():
        entry = Entry(group[0])
        times = _by_implementation(group, "us")
        entry.times = _medians(times)
        entry.steps = _medians(_by_implementation(group, "step_us"))
        entry.in_model = _medians(_by_implementation(group, "model_us"))
        in_model = [row for row in group if row.model_us is not None]
        if in_model:
            entry.bases = tuple(
                statistics.median(getattr(row, column) for row in in_model)
                for column in ("base_us", "base_after_us")
            )
        entry.spread = {
            name: (max(values) - min(values)) / entry.times[name] for name, values in times.items()
        }
        result[set_name].append(entry)
    return dict(result)


def _by_implementation(rows, attribute):
    values = defaultdict(list)
    for row in rows:
        value = getattr(row, attribute)
        if value is not None:
            values[row.implementation].append(value)
    return values


def _medians(values):
    return {name: statistics.median(of_name) for name, of_name in values.items()}


# --- A set in a few numbers -----------------------------------------------------------------------


def geometric_mean(values):
    """None of no values."""
    values = list(values)
    return math.exp(statistics.fmean(math.log(value) for value in values)) if values else None


@dataclass
class Summary:
    of_floor: dict  # implementation -> (geometric mean of time / floor, number of shapes)
    best_peer_of_floor: Optional[float]
    peer_of_ours: Optional[float]  # geometric mean of best peer / ours
    peer_count: int  # shapes that ours and at least one peer took
    targets_met: int
    targets: int  # shapes of which that can be told
    slower: list  # entries where ours takes more than 1.02 times the best peer's time, worst first
    worst: list  # entries that are furthest beyond the target, worst first


def summary(entries_of_set, worst=5):
    of_floor = {}
    for name in names_in(entries_of_set):
        ratios = [_ratio(entry.times.get(name), entry.floor) for entry in entries_of_set]
        ratios = [ratio for ratio in ratios if ratio]
        if ratios and name != FLOOR:
            of_floor[name] = (geometric_mean(ratios), len(ratios))
    compared = [entry for entry in entries_of_set if entry.peer_of_ours]
    judged = [entry for entry in entries_of_set if entry.meets_target is not None]
    missed = [entry for entry in judged if not entry.meets_target]
    return Summary(
        of_floor=of_floor,
        best_peer_of_floor=geometric_mean(
            entry.best_peer[1] / entry.floor for entry in compared if entry.floor
        ),
        peer_of_ours=geometric_mean(entry.peer_of_ours for entry in compared),
        peer_count=len(compared),
        targets_met=len(judged) - len(missed),
        targets=len(judged),
        slower=sorted(
            (entry for entry in compared if 1 / entry.peer_of_ours > 1.02),
            key=lambda entry: entry.peer_of_ours,
        ),
        worst=sorted(missed, key=_beyond_target, reverse=True)[:worst],
    )


def _beyond_target(entry):
    return entry.ours / max(1.03 * entry.floor, entry.floor + 2.0)


def best_calls(entry):
    """{name: implementation} of those measured in a model. A peer that may be called in two ways
    counts once, by the one that takes less there: "cudnn" is cudnn or cudnn-folded."""
    found = {}
    for implementation in sorted(entry.in_model, key=entry.in_model.get):
        found.setdefault(implementation.removesuffix("-folded"), implementation)
    return found


@dataclass
class ModelSummary:
    peer_of_ours: Optional[float]  # geometric mean of fastest peer / ours, in a model
    peer_count: int  # shapes that ours and at least one peer took
    behind: list  # (shape, ours / fastest peer, its name) where that is above 1.01, worst first


def model_summary(entries_of_set):
    ratios = {}
    for entry in entries_of_set:
        # A difference may come out below 0, where it is lost in the noise of what it was taken of.
        measured = {name: us for name, us in entry.in_model.items() if us > 0}
        ours, peers = measured.get(OURS), peers_of(measured)
        if ours and peers:
            best = min(peers, key=peers.get)
            ratios[entry.row.shape, best] = peers[best] / ours
    behind = [(shape, 1 / ratio, best) for (shape, best), ratio in ratios.items()]
    behind = [item for item in behind if item[1] > 1.01]
    return ModelSummary(
        geometric_mean(ratios.values()), len(ratios), sorted(behind, key=lambda i: -i[1])
    )


def names_in(entries_of_set, attribute="times"):
    """Implementations that have times: floor, ours, peers, each group in order of appearance."""
    names = dict.fromkeys(name for entry in entries_of_set for name in getattr(entry, attribute))
    return sorted(names, key=lambda name: (not name.startswith(FLOOR), not name.startswith(OURS)))
