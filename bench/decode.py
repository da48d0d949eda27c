"""Times decode beside the read floor and its peers.

    python -m bench.decode --set seed --csv seed.csv

bench/README.md has the method and the columns.
"""

import argparse
import contextlib
import fnmatch
import sys
import time
from pathlib import Path

import torch

import leanattn
from bench import timing
from bench.data import TOLERANCE, Pool, truth
from bench.implementations import IMPLEMENTATIONS, NAMES, environment, reason_of, try_call
from bench.provenance import provenance
from bench.results import FLOOR, ROWS_FLOOR, Row, Writer, shape_columns
from bench.shapes import SETS, shapes_of
from bench.tables import print_tables
from leanattn.demo_info import device_argument

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments=None):
    options = _parse(arguments)
    device = options.device
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit("bench.decode: torch sees no CUDA device; --device cpu --set tiny tries it")
        torch.cuda.set_device(device)
        device = torch.device("cuda", torch.cuda.current_device())
        leanattn.warmup(device)
    header = provenance(device, options.commit) | {"dtype": options.dtype}
    for key, value in header.items():
        print(f"{key}: {value}")
    writer = Writer(options.csv, header) if options.csv else None
    rows = []
    try:
        for measured in Bench(options, device).run():
            rows += measured
            if writer:
                writer.write(measured)
    except KeyboardInterrupt:
        print("interrupted: what follows is of the shapes so far", file=sys.stderr)
    finally:
        if writer:
            writer.close()
        print_tables(rows)
    if options.plot:
        from bench.plot import plot_all

        print("plots:", *plot_all(rows, header, options.plot))
    return 0 if rows else 1


def _parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode",
        description="Times leanattn.decode beside the read floor and its peers.",
    )
    parser.add_argument(
        "--set", action="append", required=True, choices=[*SETS, "all"], dest="sets",
        help="which shapes; may be given several times; all: seed, gqa, ragged, paged, spec",
    )  # fmt: skip
    parser.add_argument(
        "--impl", type=_patterns, metavar="NAME,...", default=None,
        help="which implementations, * and ? as in file names; default: all but "
        + ", ".join(i.name for i in IMPLEMENTATIONS if not i.is_default)
        + ". Known: " + ", ".join(NAMES),
    )  # fmt: skip
    parser.add_argument("--shape", metavar="TEXT", help="only shapes whose name contains this")
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", default=(0, 1),
        help="every N-th shape from the I-th on, I from 1 to N",
    )  # fmt: skip
    parser.add_argument("--runs", type=_positive, default=1, help="measure all of it so many times")
    parser.add_argument(
        "--seconds", type=float, help="begin no shape after so many seconds, and say what is left"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--device", type=device_argument, default="cuda", help="cuda, cuda:N; cpu to try --set tiny"
    )
    parser.add_argument(
        "--memory", type=float, default=48, metavar="GIB", help="for K and V at most; default: 48"
    )
    parser.add_argument(
        "--no-steps", action="store_true", help="no second table (eager steps, plans included)"
    )
    parser.add_argument("--csv", type=Path, help="write every row here as soon as it is measured")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write plots there")
    parser.add_argument(
        "--commit", help="for the header where there is no git; also LEANATTN_COMMIT"
    )
    options = parser.parse_args(arguments)
    if options.device.type == "cpu" and set(options.sets) != {"tiny"}:
        parser.error("--device cpu is to try the bench: it takes --set tiny alone")
    options.shapes = [
        (name, shape)
        for name, shape in shapes_of(options.sets)
        if options.shape is None or options.shape in shape.name
    ][options.shard[0] :: options.shard[1]]
    if not options.shapes:
        parser.error("no shape is left by --shape and --shard")
    for path in [options.csv and options.csv.parent, options.plot]:
        if path:
            path.mkdir(parents=True, exist_ok=True)
    return options


def _patterns(text):
    patterns = text.split(",")
    for pattern in patterns:
        if not fnmatch.filter(NAMES, pattern):
            raise argparse.ArgumentTypeError(f"{pattern!r} matches none of {', '.join(NAMES)}")
    return patterns


def _shard(text):
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, got {text!r}")
    return index - 1, count


def _positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, got {text!r}")
    return int(text)


class Bench:
    """Measures shape after shape."""

    def __init__(self, options, device):
        self.options, self.device = options, device
        self.implementations = [
            implementation
            for implementation in IMPLEMENTATIONS
            if (implementation.is_default if options.impl is None
                else any(fnmatch.fnmatch(implementation.name, p) for p in options.impl))
        ]  # fmt: skip
        self.shapes = options.shapes
        self.told = set()
        self.missing = {}  # implementation -> why it is not importable

    def run(self):
        """Yields the rows of each shape."""
        shapes = [shape for _, shape in self.shapes]
        dtype = DTYPES[self.options.dtype]
        self.pool = Pool(shapes, dtype, self.device, self.options.memory * 2**30)
        self.sink = torch.zeros(1, dtype=torch.int32, device=self.device)
        began = time.perf_counter()
        todo = [(run, *item) for run in range(self.options.runs) for item in self.shapes]
        with _progress(len(todo)) as advance:
            for done, (run, set_name, shape) in enumerate(todo):
                seconds = time.perf_counter() - began
                if self.options.seconds and seconds > self.options.seconds:
                    print(f"{len(todo) - done} of {len(todo)} shapes left after {seconds:.0f} s, "
                          f"from {shape.name} of {set_name}, run {run + 1}, on")  # fmt: skip
                    return
                advance(f"{set_name} {shape.name}")
                try:
                    case = self.pool.case(shape)
                except MemoryError as error:
                    print(f"{set_name} {shape.name}: skipped: {error}", flush=True)
                    continue
                columns = shape_columns(set_name, shape) | {"run": run}
                yield [Row(**columns, **values) for values in self.measure(case)]

    def measure(self, case):
        """A dict of the remaining columns of `Row` for each implementation."""
        results, prepared = self._prepare(case)
        if self.device.type == "cpu":
            calls = {name: p.call for name, (_, p) in prepared.items()}
            times = timing.cpu_times(calls, case.sets)
        else:
            times = timing.graph_times(self._capture(case, prepared, results))
        for name, t in times.items():
            results.setdefault(name, {}).update(
                us=t.median, us_quartile1=t.quartile1, us_quartile3=t.quartile3, rounds=t.rounds,
                calls=t.calls,
            )  # fmt: skip
        if not self.options.no_steps:
            for name, (implementation, p) in prepared.items():
                results[name]["step_us"] = self._step(case, implementation, p)
        return [{"implementation": name, **values} for name, values in results.items()]

    def _prepare(self, case):
        """Each implementation's columns so far, and {name: (implementation, prepared)} of those
        whose answer is right."""
        expected = truth(case)
        results, prepared = {}, {}
        for implementation in self.implementations:
            name = implementation.name
            if name in self.missing:
                results[name] = {"reason": self.missing[name]}
                continue
            made, out = try_call(implementation, case)
            if made is None:
                self._refused(case, name, out, results)
                continue
            error = expected.error(out)
            results[name] = {"error": error}
            if not error <= TOLERANCE:  # NaN too
                self._refused(case, name, f"wrong answer, relative error {error:.2g}", results)
                continue
            prepared[name] = (implementation, made)
        return results, prepared

    def _refused(self, case, name, reason, results):
        results.setdefault(name, {})["reason"] = reason
        if (name, reason) not in self.told:
            self.told.add((name, reason))
            print(f"{name}: {reason} (first at {case.shape.name})", flush=True)
        if reason.startswith("not importable"):
            self.missing[name] = reason
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # raises if that call broke the device for all that follow

    def _capture(self, case, prepared, results):
        """{name: CudaGraph}, the floor's first."""

        def floor(inputs):
            torch.ops.leanattn.read_floor(inputs.k_visible, inputs.v_visible, self.sink)

        def rows_floor(inputs):
            torch.ops.leanattn.read_rows_floor(inputs.k_cache, inputs.v_cache, self.sink)

        graphs = {FLOOR: timing.CudaGraph(floor, case.sets)}
        if case.shape.has_short_rows and torch.cuda.get_device_capability(self.device) >= (9, 0):
            with environment(LEANATTN_LOADER="tma"):  # that floor is of bulk copies alone
                graphs[ROWS_FLOOR] = timing.CudaGraph(rows_floor, case.sets)
        for name, (implementation, p) in prepared.items():
            try:
                with implementation.context():
                    graphs[name] = timing.CudaGraph(p.call, case.sets)
            except Exception as error:  # whatever a library raises is its reason
                reason = f"cannot be captured in a CUDA graph: {reason_of(error)}"
                self._refused(case, name, reason, results)
        return graphs

    def _step(self, case, implementation, prepared):
        def step(inputs):
            if prepared.plan:
                prepared.plan()
            prepared.call(inputs)

        with implementation.context():
            return timing.step_microseconds(step, case.sets, self.device)


@contextlib.contextmanager
def _progress(total):
    """A function that takes the next shape's name; with rich and a terminal, a bar."""
    try:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

        is_terminal = sys.stderr.isatty()
    except ImportError:
        is_terminal = False
    if not is_terminal:
        yield lambda name: None
        return
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        shown = iter(range(total))
        yield lambda name: progress.update(task, description=name, completed=next(shown))


if __name__ == "__main__":
    sys.exit(main())
