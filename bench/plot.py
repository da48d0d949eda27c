"""Plots and tables out of result files.

    python -m bench.plot results/*.csv --out results/plots

Writes PNG files and tables.md there, and prints the geometric means as Markdown.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from bench.results import FLOOR, OURS, ROWS_FLOOR, best_calls, entries, names_in, read
from bench.tables import (
    markdown,
    means_table,
    model_summary_text,
    model_table,
    steps_table,
    summary_text,
    times_table,
)

# Okabe and Ito's palette, which colour-blind readers can tell apart; a family has one colour.
_BLACK, _GREY = "#000000", "#777777"
_BLUE, _SKY, _ORANGE, _GREEN = "#0072B2", "#56B4E9", "#E69F00", "#009E73"
_VERMILION, _PURPLE, _YELLOW = "#D55E00", "#CC79A7", "#D0C000"
STYLES = {  # implementation -> colour, line, marker
    FLOOR: (_BLACK, "--", ""),
    ROWS_FLOOR: (_BLACK, ":", ""),
    OURS: (_BLUE, "-", "o"),
    "leanattn-counters": (_SKY, "-", "o"),
    "leanattn-no_lengths": (_BLUE, "--", "D"),
    "leanattn-cp_async": (_SKY, "--", "v"),
    "leanattn-batch_invariant": (_SKY, ":", "^"),
    "cudnn": (_ORANGE, "-", "s"),
    "cudnn-folded": (_ORANGE, "--", "s"),
    "flash": (_GREEN, "-", "D"),
    "flash-folded": (_GREEN, "--", "D"),
    "efficient": (_YELLOW, "-", "P"),
    "efficient-folded": (_YELLOW, "--", "P"),
    "math": (_GREY, ":", "x"),
    "flashinfer": (_VERMILION, "-", "^"),
    "flashinfer-batch_attention": (_VERMILION, "--", "v"),
    "flashinfer-xqa": (_VERMILION, ":", "<"),
    "fa2": (_GREY, "-", "X"),
    "fa3": (_PURPLE, "-", "X"),
    "flashmla": (_PURPLE, "--", "P"),
}
_SWEEP_COLOURS = (_BLUE, _ORANGE, _GREEN, _VERMILION, _PURPLE, _SKY, _GREY)
_HATCHES = {"-": "", "--": "////", ":": "....", "-.": "xxxx"}  # of bars, where lines have these
_DPI = 150


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.plot", description="Plots and tables out of result files."
    )
    parser.add_argument("csv", nargs="+", type=Path, help="what --csv wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    options = parser.parse_args(arguments)
    headers, rows = [], []
    for path in options.csv:
        try:
            header, rows_of_file = read(path)
        except (OSError, ValueError) as error:
            sys.exit(f"bench.plot: {error}")
        headers.append((path.name, header))
        rows += rows_of_file
    if not rows:
        sys.exit("bench.plot: these files hold no rows")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tables.md").write_text(tables_markdown(headers, rows))
    plot_all(rows, headers[0][1], options.out)
    print(markdown(*means_table(rows)))
    return 0


def tables_markdown(headers, rows):
    """Where the figures come from, the means, and each set shape by shape."""
    parts = ["# Results\n\n"]
    for name, header in headers:
        lines = "".join(f"- {key}: {value}\n" for key, value in header.items())
        parts.append(f"`{name}`\n\n{lines}\n")
    parts.append(
        "Time / read floor, geometric means; in brackets the number of shapes that an "
        f"implementation took, where not all.\n\n{markdown(*means_table(rows))}\n"
    )
    for name, group in entries(rows).items():
        parts.append(f"## {name}\n\n")
        if any(entry.in_model for entry in group):
            parts.append(
                "Microseconds over the floor, in a graph of decodes alone / in a model; base: a "
                f"layer without a decode, before / after.\n\n{markdown(*model_table(group))}\n"
            )
            parts.append(model_summary_text(name, group).replace("\n", "\n\n"))
        parts.append(f"Microseconds a call.\n\n{markdown(*times_table(group))}\n")
        parts.append(summary_text(name, group).replace("\n", "\n\n"))
        if any(entry.steps for entry in group):
            table = markdown(*steps_table(group))
            parts.append(
                "Microseconds of an eager step by the wall clock, host and plan included.\n\n"
                f"{table}\n"
            )
    return "".join(parts)


def plot_all(rows, header, directory):
    """Writes what the rows are enough for; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    groups = entries(rows)
    paths = []
    for name, plot in (("in_model", _plot_in_model), ("latency", _plot_latency),
                       ("ratio", _plot_ratio), ("bandwidth", _plot_bandwidth)):  # fmt: skip
        figure = plot(groups)
        if figure is None:
            continue
        text = ", ".join(header[key] for key in ("device", "date", "commit") if key in header)
        figure.text(0.995, 0.002, text, ha="right", va="bottom", fontsize=6, color=_GREY)
        path = Path(directory) / f"{name}.png"
        figure.savefig(path, dpi=_DPI)
        paths.append(path)
    return paths


def _figure(rows, columns, width=5.2, height=3.6):
    """A figure of its own, outside pyplot's registry, and its axes as a list of lists."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw(axes, name, xs, ys, **options):
    colour, line, marker = STYLES[name]
    front = name in (FLOOR, OURS)
    axes.plot(
        xs, ys, line, color=colour, marker=marker, markersize=4, label=name,
        linewidth=2 if front else 1.2, zorder=3 if front else 2, **options,
    )  # fmt: skip


def _legend(figure, axes_list, columns=6):
    """One for all axes, below them."""
    handles = {}
    for axes in axes_list:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=min(columns, len(handles)),
        frameon=False, fontsize=8,
    )  # fmt: skip


def _plot_in_model(groups):
    """Bars of what is over the floor, a panel a set: pale in a model, full alone."""
    groups = {
        name: [entry for entry in group if entry.in_model and entry.floor]
        for name, group in groups.items()
    }
    groups = {name: group for name, group in groups.items() if group}
    if not groups:
        return None
    bars = {name: _bars(group) for name, group in groups.items()}
    height = max(entry_bars[-1][0] for entry_bars in bars.values()) * 0.09 + 1.5
    figure, axes = _figure(1, len(groups), width=7, height=height)
    for panel, (set_name, group) in zip(axes[0], groups.items()):
        for y, entry, name, implementation in bars[set_name]:
            colour, line, _ = STYLES[name]
            style = dict(color=colour, hatch=_HATCHES[line], edgecolor="white", linewidth=0)
            in_model = entry.in_model[implementation] - entry.floor
            panel.barh(y, in_model, 0.9, alpha=0.45, label=f"{name}, in a model", **style)
            if implementation in entry.times:
                alone = entry.times[implementation] - entry.floor
                panel.barh(y, alone, 0.45, label=f"{name}, alone", **style)
        centres = {}
        for y, entry, *_ in bars[set_name]:
            centres.setdefault(entry.row.shape, []).append(y)
        panel.set_yticks([sum(ys) / len(ys) for ys in centres.values()], centres, fontsize=7)
        panel.set(xlabel="us over the floor", title=set_name)
        panel.margins(y=0.01)
        panel.invert_yaxis()
        panel.grid(alpha=0.3, axis="x")
    _legend(figure, axes[0], columns=4)
    return figure


def _bars(group):
    """[(y, entry, name, implementation)], with a gap between shapes."""
    order = {name: i for i, name in enumerate(STYLES)}
    bars, y = [], 0
    for entry in group:
        for name, implementation in sorted(best_calls(entry).items(), key=lambda c: order[c[0]]):
            bars.append((y, entry, name, implementation))
            y += 1
        y += 1
    return bars


def _plot_latency(groups):
    """Latency against context, of the uniform shapes of the set `seed`: a panel for each batch and
    head setting."""
    panels = defaultdict(list)
    for entry in groups.get("seed", []):
        row = entry.row
        panels[row.batch, row.heads_q, row.head_dim].append(entry)
    panels = {key: group for key, group in panels.items() if len(group) > 1}
    if not panels:
        return None
    batches = sorted({batch for batch, _, _ in panels})
    settings = sorted({key[1:] for key in panels})
    figure, axes = _figure(len(settings), len(batches))
    for (batch, heads, head_dim), group in panels.items():
        panel = axes[settings.index((heads, head_dim))][batches.index(batch)]
        group.sort(key=lambda entry: entry.row.longest)
        for name in names_in(group):
            points = [(e.row.longest, e.times[name]) for e in group if name in e.times]
            _draw(panel, name, *zip(*points))
        panel.set(xscale="log", yscale="log", title=f"batch {batch}, {heads} heads of {head_dim}")
        panel.set_xscale("log", base=2)
        panel.set(xlabel="context, tokens", ylabel="us a call")
        panel.grid(alpha=0.3)
    _legend(figure, axes.flat)
    return figure


def _plot_ratio(groups):
    """Best peer's time over ours against the batch-context ratio, of the set `ragged`'s sweep."""
    sweeps = defaultdict(list)
    for entry in groups.get("ragged", []):
        row = entry.row
        if "ratio" in row.shape and entry.peer_of_ours:
            key = (row.heads_q, row.heads_kv, row.batch, row.longest)
            sweeps[key].append((row.tokens / row.batch / row.longest, entry.peer_of_ours))
    sweeps = {key: sorted(points) for key, points in sweeps.items() if len(points) > 1}
    if not sweeps:
        return None
    figure, axes = _figure(1, 1, width=6.4, height=5)
    panel = axes[0][0]
    for i, ((heads_q, heads_kv, batch, longest), points) in enumerate(sweeps.items()):
        panel.plot(
            *zip(*points), "os^DvPX"[i % 7] + "-", color=_SWEEP_COLOURS[i % 7],
            label=f"batch {batch}, {heads_q}/{heads_kv} heads, to {longest}",
        )  # fmt: skip
    panel.axhline(1, color=_BLACK, linewidth=1, linestyle="--")
    panel.set(xlabel="batch-context ratio: average / longest context",
              ylabel="best peer's time / leanattn's")  # fmt: skip
    panel.grid(alpha=0.3)
    _legend(figure, [panel], columns=2)
    return figure


def _plot_bandwidth(groups):
    """TB/s against MiB, a panel a set."""
    groups = {name: group for name, group in groups.items() if any(e.times for e in group)}
    if not groups:
        return None
    columns = min(3, len(groups))
    figure, axes = _figure(-(-len(groups) // columns), columns)
    panels = list(axes.flat)
    for panel, (set_name, group) in zip(panels, groups.items()):
        for name in reversed(names_in(group)):
            points = sorted(
                (e.row.mib, e.terabytes(e.times[name])) for e in group if name in e.times
            )
            colour, _, marker = STYLES[name]
            panel.plot(
                *zip(*points), marker=marker or "_", linestyle="", label=name, color=colour,
                markersize=5 if name in (FLOOR, OURS) else 3.5, alpha=0.85,
            )  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set(xlabel="K and V, MiB", ylabel="TB/s", title=set_name, ylim=(0, None))
        panel.grid(alpha=0.3)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    _legend(figure, panels[: len(groups)])
    return figure


if __name__ == "__main__":
    sys.exit(main())
