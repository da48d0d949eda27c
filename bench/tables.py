"""Results as text: rich tables on a terminal, plain columns elsewhere, Markdown for the README."""

from bench.results import FLOOR, best_calls, entries, model_summary, names_in, summary


def print_tables(rows, markdown=False):
    """Every set: shape by shape, then in geometric means, then steps with host and plan."""
    show = _print_markdown if markdown else _print_table
    for name, group in entries(rows).items():
        show(f"{name}: us a call", *times_table(group))
        print(summary_text(name, group))
        if any(entry.steps for entry in group):
            show(f"{name}: us an eager step by the wall clock, host and plan included",
                 *steps_table(group))  # fmt: skip
    show("geometric means of time/floor; in brackets the shapes taken, where not all",
         *means_table(rows))  # fmt: skip
    spread = max((s for group in entries(rows).values() for e in group for s in e.spread.values()),
                 default=0)  # fmt: skip
    if len({row.run for row in rows}) > 1:
        print(f"Largest spread over runs, (max - min) / median: {spread:.1%}")


def print_model_tables(rows):
    """Every set in the model, short: what each decode takes over the floor, and what follows."""
    for name, group in entries(rows).items():
        title = f"{name}: us over the floor, in a graph of decodes alone / in a model"
        _print_table(title, *model_table(group))
        print(model_summary_text(name, group))


def model_table(group):
    """(header, lines)"""
    names = dict.fromkeys(name.removesuffix("-folded") for name in names_in(group, "in_model"))
    header = ["shape", "MiB", "floor", "base", *names]
    lines = []
    for entry in group:
        calls = best_calls(entry)
        lines.append(
            [
                entry.row.shape,
                f"{entry.row.mib:.3g}" if entry.row.mib < 1 else f"{entry.row.mib:.0f}",
                _us(entry.floor),
                " / ".join(f"{us:.1f}" for us in entry.bases),
                *(_over_floor(entry, calls.get(name)) for name in names),
            ]
        )
    return header, lines


def _over_floor(entry, implementation):
    """Alone / in the model; without a floor, which the CPU has not, the times themselves."""
    if implementation is None:
        return ""
    floor = entry.floor or 0.0
    times = (entry.times.get(implementation), entry.in_model[implementation])
    return " / ".join("-" if us is None else f"{us - floor:.1f}" for us in times)


def model_summary_text(name, group):
    s = model_summary(group)
    if not s.peer_count:
        return ""
    behind = _list(f"{shape} {ratio:.2f} ({peer})" for shape, ratio, peer in s.behind)
    return (
        f"{name}: in the model, fastest peer/ours: {s.peer_of_ours:.3f} ({s.peer_count})\n"
        f"{name}: more than 1% behind the fastest peer there: {len(s.behind)} of "
        f"{s.peer_count}: {behind}\n"
    )


def times_table(group):
    """(header, lines)"""
    names = names_in(group)
    header = ["shape", "MiB", *names, "TB/s", "time/floor", "target", "best peer", "peer/ours"]
    lines = []
    for entry in group:
        best = entry.best_peer
        met = entry.meets_target
        lines.append(
            [
                entry.row.shape,
                f"{entry.row.mib:.3g}" if entry.row.mib < 1 else f"{entry.row.mib:.0f}",
                *(_us(entry.times.get(name)) for name in names),
                f"{entry.terabytes(entry.ours):.2f}" if entry.ours else "",
                _two(entry.ours_of_floor),
                "" if met is None else "met" if met else "missed",
                best[0] if best else "",
                _two(entry.peer_of_ours),
            ]
        )
    return header, lines


def steps_table(group):
    names = names_in(group, "steps")
    lines = [[entry.row.shape, *(_us(entry.steps.get(name)) for name in names)] for entry in group]
    return ["shape", *names], lines


def summary_text(name, group):
    """A set in a few lines."""
    s = summary(group)
    lines = []
    if s.of_floor:
        means = ", ".join(f"{n} {mean:.3f} ({count})" for n, (mean, count) in s.of_floor.items())
        lines.append(f"time/floor, geometric means over the shapes each took: {means}")
    if s.best_peer_of_floor:
        lines.append(f"best peer/floor: {s.best_peer_of_floor:.3f} ({s.peer_count})")
    if s.peer_of_ours:
        lines.append(f"best peer/ours: {s.peer_of_ours:.3f} ({s.peer_count})")
    if s.targets:
        lines.append(
            f"within max(1.03 floor, floor + 2 us): {s.targets_met} of {s.targets}; furthest from "
            "it: " + _list(f"{e.row.shape} {e.ours:.2f} at {e.floor:.2f}" for e in s.worst)
        )
    if s.peer_count:
        lines.append(
            f"more than 2% slower than the best peer: {len(s.slower)} of {s.peer_count}: "
            + _list(f"{e.row.shape} {1 / e.peer_of_ours:.2f} ({e.best_peer[0]})" for e in s.slower)
        )
    return "".join(f"{name}: {line}\n" for line in lines)


def means_table(rows):
    """(header, lines): a line a set, of geometric means of time/floor."""
    groups = entries(rows)
    names = names_in([entry for group in groups.values() for entry in group])
    names = [name for name in names if name != FLOOR]
    header = ["set", "shapes", *names, "best peer", "best peer/ours", "target met"]
    lines = []
    for set_name, group in groups.items():
        s = summary(group)
        means = [s.of_floor.get(name) for name in names]
        lines.append(
            [
                set_name,
                str(len(group)),
                *(f"{m[0]:.3f}" + f" ({m[1]})" * (m[1] != len(group)) if m else "" for m in means),
                f"{s.best_peer_of_floor:.3f}" if s.best_peer_of_floor else "",
                f"{s.peer_of_ours:.3f}" if s.peer_of_ours else "",
                f"{s.targets_met} of {s.targets}",
            ]
        )
    return header, lines


def markdown(header, lines):
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [header, rule, *lines])


def _us(value):
    return "" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.1f}"


def _two(value):
    return "" if value is None else f"{value:.2f}"


def _list(texts):
    return "; ".join(texts) or "none"


def _print_markdown(title, header, lines):
    print(f"\n{title}\n\n{markdown(header, lines)}")


def _print_table(title, header, lines):
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        print(f"\n{title}")
        for line in [header, *lines]:
            cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]
            print("  ".join(cells).rstrip())
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    # A log file has no width; figures must not be cut there.
    console = Console()
    (console if console.is_terminal else Console(width=400)).print(table)
