"""Puts README's figures in a model there, out of the newest results.

python -m bench.readme
"""

import math
import re

from bench import ROOT
from bench.results import FLOOR, OURS, read

RESULTS = ROOT / "bench" / "results"
PLAIN = RESULTS / "2026-11-29-h200-in-model-v13.csv"
GENERAL = RESULTS / "2026-11-29-h200-in-model-general-v13.csv"
LATENT = RESULTS / "2026-11-29-h200-in-model-latent-v13.csv"

PEERS = {"cudnn": "cuDNN", "fa3": "FA3"}
LATENT_PEERS = {"flashmla": "FlashMLA"}
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
FIRST = list(SHAPES)[:5] + list(SHAPES)[-3:]  # on README's first screen
LATENT_SHAPES = {
    f"b{batch} {heads}/1 D576/512 s{tokens}{page}": f"b{batch} {heads} heads s{tokens}"
    for heads in (16, 64, 128)
    for batch, tokens, page in ((1, 8192, ""), (1, 131072, ""), (16, 8192, " page 64"),
                                (64, 4096, " page 64"), (64, 32768, " page 64"))
}  # fmt: skip
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
    path.write_text(filled(path.read_text()))


def filled(text):
    """README's text, with what stands between the two marks of each part made anew."""
    for name, part in parts().items():
        begin, end = f"<!-- {name}: by python -m bench.readme -->\n", f"<!-- {name} -->\n"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        assert len(re.findall(pattern, text, re.S)) == 1, f"README has no place for {name}"
        text = re.sub(pattern, lambda _: begin + part + end, text, flags=re.S)
    return text


def parts():
    plain = by_shape(PLAIN)
    return {
        "first": table(plain, {name: SHAPES[name] for name in FIRST}, PEERS),
        "plain": table(plain, SHAPES, PEERS) + "\n" + summary(plain, PEERS),
        "general": general_table(),
        "latent": table(by_shape(LATENT), LATENT_SHAPES, LATENT_PEERS)
        + "\n" + summary(by_shape(LATENT), LATENT_PEERS),
    }  # fmt: skip


def table(shapes, titles, peers):
    """shapes: {shape: its rows}; titles: {shape: how README calls it}, of those to show."""
    lines = ["| | MiB | floor | leanattn | " + " | ".join(peers.values()) + " |",
             "| --- " * (4 + len(peers)) + "|"]  # fmt: skip
    for name, title in titles.items():
        rows = shapes[name]
        ours = over(rows, OURS)
        if is_behind(rows, peers):
            ours = f"**{ours}**"
        cells = [title, f"{rows[FLOOR].mib:.0f}", f"{rows[FLOOR].us:.1f}", ours]
        lines.append("| " + " | ".join(cells + [over(rows, peer) for peer in peers]) + " |")
    return "\n".join(lines) + "\n"


def summary(shapes, peers):
    measured = [rows for rows in shapes.values() if fastest_peer(rows, peers)]
    behind = sum(is_behind(rows, peers) for rows in measured)
    ratios = [fastest_peer(rows, peers) / whole(rows, OURS) for rows in measured]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    where = ", in bold where they stand above" if behind else ""
    return (
        f"Over all {len(measured)} shapes the fastest peer takes {mean:.2f} times as long in "
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


def fastest_peer(rows, peers):
    return min((us for us in (whole(rows, peer) for peer in peers) if us is not None), default=None)


def is_behind(rows, peers):
    peer = fastest_peer(rows, peers)
    return peer is not None and whole(rows, OURS) > TIE * peer


if __name__ == "__main__":
    main()
