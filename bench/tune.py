"""Checks the choices that a launch makes: what was chosen beside every other choice, forced.

    python -m bench.tune --set gqa --knob LEANATTN_LAYOUT

For each shape the time with nothing forced, with each combination of the knobs' values, and the
loss, by how much what was chosen is slower than the best of all.
"""

import argparse
import itertools
import sys

import torch

import leanattn
from bench import timing
from bench.data import TOLERANCE, Pool, truth
from bench.implementations import IMPLEMENTATIONS, OURS, Implementation, environment, try_call
from bench.provenance import provenance
from bench.shapes import SETS, shapes_of

# Environment variables that force a choice, with the values to try; a new knob is a line here.
KNOBS = {
    "LEANATTN_NUM_UNITS": ("132", "128", "120", "112", "96", "80", "66", "64", "48", "32"),
    "LEANATTN_LAYOUT": (
        "stream_k",
        *(f"teams:{n}" for n in (1, 2, 4, 8, 16, 32)),
        *(f"clusters:{n}" for n in range(2, 9)),
        *(f"clusters:{n}*{m}" for n in (2, 4, 8) for m in (2, 4, 8, 14)),
    ),
    "LEANATTN_LOADER": ("tma", "cp_async"),
    "LEANATTN_HEAD_PAIRS": ("0", "1"),
}
ALLOWED_LOSS = 0.03


def main(arguments=None):
    options = _parse(arguments)
    if not torch.cuda.is_available():
        sys.exit("bench.tune: torch sees no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    leanattn.warmup(device)
    for key, value in provenance(device, options.commit).items():
        print(f"{key}: {value}")
    shapes = [shape for _, shape in shapes_of(options.sets) if (options.shape or "") in shape.name]
    if not shapes:
        sys.exit(f"bench.tune: no shape has {options.shape!r} in its name")
    pool = Pool(shapes, torch.bfloat16, device, options.memory * 2**30)
    losses = {}
    for shape in shapes:
        try:
            times = measure(pool.case(shape), choices(options.knobs, leanattn_units(device)))
        except MemoryError as error:
            print(f"{shape.name}: skipped: {error}")
            continue
        print(line(shape.name, times), flush=True)
        losses[shape.name] = loss(times)
    beyond = {name: value for name, value in losses.items() if value > ALLOWED_LOSS}
    print(
        f"{len(beyond)} of {len(losses)} shapes lose more than {ALLOWED_LOSS:.0%} to another choice"
    )
    for name, value in sorted(beyond.items(), key=lambda item: -item[1]):
        print(f"  {value:6.1%}  {name}")
    return 0


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune",
        description="Checks the choices that a launch makes against every other choice, forced.",
    )
    parser.add_argument(
        "--set", action="append", choices=[*SETS, "all"], dest="sets", help="default: versions"
    )
    parser.add_argument("--shape", metavar="TEXT", help="only shapes whose name contains this")
    parser.add_argument(
        "--knob", action="append", choices=KNOBS, dest="knobs",
        help="what to force; of several every combination; default: LEANATTN_LAYOUT",
    )  # fmt: skip
    parser.add_argument("--memory", type=float, default=48, metavar="GIB", help="default: 48")
    parser.add_argument("--commit", help="where there is no git")
    options = parser.parse_args(arguments)
    options.sets = options.sets or ["versions"]
    options.knobs = options.knobs or ["LEANATTN_LAYOUT"]
    return options


def leanattn_units(device):
    return torch.ops.leanattn.max_units(device.index)


def choices(knobs, max_units):
    """Every combination of the knobs' values, as dicts; more units than fit are left out."""
    values = [
        [v for v in KNOBS[knob] if knob != "LEANATTN_NUM_UNITS" or int(v) <= max_units]
        for knob in knobs
    ]
    return [dict(zip(knobs, combination)) for combination in itertools.product(*values)]


def name_of(choice):
    return " ".join(f"{k.removeprefix('LEANATTN_').lower()}={v}" for k, v in choice.items())


def measure(case, forced):
    """{name: microseconds}; "chosen" is with nothing forced. What refuses or is wrong says so."""
    ours = next(i for i in IMPLEMENTATIONS if i.name == OURS)
    expected = truth(case)
    graphs = {}
    for choice in [{}, *forced]:
        name = name_of(choice) or "chosen"
        variant = Implementation(name, ours.prepare, lambda c=choice: environment(**c))
        prepared, out = try_call(variant, case)
        if prepared is None:
            print(f"{case.shape.name}, {name}: {out}")
        elif not expected.error(out) <= TOLERANCE:
            print(f"{case.shape.name}, {name}: wrong answer")
        else:
            with variant.context():
                graphs[name] = timing.CudaGraph(prepared.call, case.sets)
    return {name: t.median for name, t in timing.graph_times(graphs).items()} if graphs else {}


def loss(times):
    """By how much "chosen" is slower than the best; 0 where it could not be measured."""
    return times["chosen"] / min(times.values()) - 1 if "chosen" in times else 0.0


def line(shape_name, times):
    best = min(times, key=times.get, default="nothing")
    others = "  ".join(f"{name} {us:.2f}" for name, us in times.items())
    return f"{shape_name}: loss {loss(times):.1%}, best {best}: {others}"


if __name__ == "__main__":
    sys.exit(main())
