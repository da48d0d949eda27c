"""Puts the figures of README's "Speed in a model" there, out of the newest results.

python -m bench.readme
"""

import math

from bench import ROOT
from bench.results import FLOOR, OURS, read

RESULTS = ROOT / "bench" / "results"
PLAIN = RESULTS / "2026-11-28-h200-in-model-v11.csv"
GENERAL = RESULTS / "2026-11-28-h200-in-model-general-v12.csv"
BEGIN = "<!-- what follows is by python -m bench.readme -->\n"
END = "<!-- and up to here -->\n"

PEERS = {"cudnn": "cuDNN", "fa3": "FA3"}
SHAPES = {  # in the CSV -> in README
    "b1 32/8 D128 s1024 bshd": "b1 32/8 s1024",
    "b1 32/8 D128 s8192 bshd": "b1 32/8 s8192",
    "b1 32/32 D128 s2048 bshd": "b1 32/32 s2048",
    "b8 32/8 D128 s4096 bshd": "b8 32/8 s4096",
    "b32 32/8 D128 s2048 bshd": "b32 32/8 s2048",
    "b128 32/8 D128 s1024 bshd": "b128 32/8 s1024",
    "b16 40/10 D128 s4096 bshd": "b16 40/10 s4096",
    "b1 28/4 D128 s131072 bshd": "b1 28/4 s131072",
    "b8 32/8 D128 1024 to 65536": "8 sequences of 1024 to 65536, 32/8",
    "b8 32/8 D128 100 to 4096 page 16": "8 of 100 to 4096, pages of 16",
    "b32 32/8 D128 100 to 8192 page 64": "32 of 100 to 8192, pages of 64",
}
FEATURES = {
    "window": "window of half the context",
    "sinks": "sinks",
    "softcap": "softcap",
    "ALiBi": "ALiBi",
    "q4": "4 queries a sequence",
    "cu_seqlens_q": "the same query by `cu_seqlens_q`",
}
# A decode is behind a peer where its time, floor and all, is longer by more than this.
TIE = 1.01


def main():
    path = ROOT / "README.md"
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(before + BEGIN + figures() + END + rest.partition(END)[2])


def figures():
    """The text between the two marks."""
    return f"{plain_table()}\n{summary()}\n{general_table()}\n"


def plain_table():
    lines = ["| | MiB | floor | leanattn | " + " | ".join(PEERS.values()) + " |",
             "| --- " * (4 + len(PEERS)) + "|"]  # fmt: skip
    shapes = by_shape(PLAIN)
    for name, title in SHAPES.items():
        rows = shapes[name]
        ours = over(rows, OURS)
        if is_behind(rows):
            ours = f"**{ours}**"
        cells = [title, f"{rows[FLOOR].mib:.0f}", f"{rows[FLOOR].us:.1f}", ours]
        lines.append("| " + " | ".join(cells + [over(rows, peer) for peer in PEERS]) + " |")
    return "\n".join(lines) + "\n"


def summary():
    shapes = [rows for rows in by_shape(PLAIN).values() if fastest_peer(rows)]
    behind = sum(map(is_behind, shapes))
    ratios = [fastest_peer(rows) / whole(rows, OURS) for rows in shapes]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    where = ", in bold where they stand above" if behind else ""
    return (
        f"Over all {len(shapes)} shapes the fastest peer takes {mean:.2f} times as long in "
        f"geometric\nmean; leanattn is more than 1% behind it on {behind or 'none'}{where}.\n"
    )


def general_table():
    shapes = by_shape(GENERAL)
    columns = list(dict.fromkeys(name.rpartition(" bshd ")[0] + " bshd" for name in shapes))
    lines = ["| | " + " | ".join(SHAPES[column] for column in columns) + " |",
             "| --- " * (1 + len(columns)) + "|"]  # fmt: skip
    for feature, title in FEATURES.items():
        cells = [title]
        for column in columns:
            found = [n for n in shapes if n.startswith(f"{column} {feature}")]
            cells.append(over(shapes[found[0]], OURS) if found else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def by_shape(path):
    """{shape: {implementation: its row}}."""
    shapes = {}
    for row in read(path)[1]:
        shapes.setdefault(row.shape, {})[row.implementation] = row
    return shapes


def whole(rows, name):
    """What a decode adds to a layer, us; None where it was not measured."""
    return rows[name].model_us if name in rows else None


def over(rows, name):
    us = whole(rows, name)
    return "-" if us is None else f"+{us - rows[FLOOR].us:.1f}"


def fastest_peer(rows):
    return min((us for us in (whole(rows, peer) for peer in PEERS) if us is not None), default=None)


def is_behind(rows):
    peer = fastest_peer(rows)
    return peer is not None and whole(rows, OURS) > TIE * peer


if __name__ == "__main__":
    main()
