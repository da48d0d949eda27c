"""What the commands that measure shape after shape have in common: arguments, the CSV file, which
implementations take part, and what is told of those that do not."""

import argparse
import contextlib
import fnmatch
import sys
import time
from pathlib import Path

import torch

import leanattn
from bench import timing
from bench.data import TOLERANCE, Pool
from bench.implementations import IMPLEMENTATIONS, NAMES, environment, reason_of, try_call
from bench.provenance import provenance
from bench.results import FLOOR, ROWS_FLOOR, Row, Writer, shape_columns
from bench.shapes import SETS, shapes_of
from leanattn.demo.info import device_argument

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(kind, arguments=None):
    """The command that `kind`, a class derived from Bench, stands for."""
    options = _parse(kind, arguments)
    device = options.device
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.exit(f"{kind.name}: torch sees no CUDA device; --device cpu --set tiny tries it")
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        leanattn.warmup(device)
    header = provenance(device, options.commit) | {"dtype": options.dtype}
    for key, value in header.items():
        print(f"{key}: {value}")
    writer = Writer(options.csv, header) if options.csv else None
    rows = []
    try:
        for measured in kind(options, device).run():
            rows += measured
            if writer:
                writer.write(measured)
    except KeyboardInterrupt:
        print("interrupted: what follows is of the shapes so far", file=sys.stderr)
    finally:
        if writer:
            writer.close()
        kind.print_tables(rows)
    if options.plot:
        from bench.plot import plot_all

        print("plots:", *plot_all(rows, header, options.plot))
    return 0 if rows else 1


def _parse(kind, arguments):
    parser = argparse.ArgumentParser(prog=f"python -m {kind.name}", description=kind.description)
    default_set = f"default: {', '.join(kind.default_sets)}; " if kind.default_sets else ""
    parser.add_argument(
        "--set", action="append", required=not kind.default_sets, choices=[*SETS, "all"],
        dest="sets", help="which shapes; may be given several times; " + default_set
        + "all: " + ", ".join(kind.all_sets),
    )  # fmt: skip
    parser.add_argument(
        "--impl", type=_patterns, metavar="NAME,...", default=kind.default_implementations,
        help="which implementations, * and ? as in file names; default: "
        + ", ".join(kind.default_implementations) + ". Known: " + ", ".join(NAMES),
    )  # fmt: skip
    parser.add_argument("--shape", metavar="TEXT", help="only shapes whose name contains this")
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", default=(0, 1),
        help="every N-th shape from the I-th on, I from 1 to N",
    )  # fmt: skip
    parser.add_argument("--runs", type=positive, default=1, help="measure all of it so many times")
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
    parser.add_argument("--csv", type=Path, help="write every row here as soon as it is measured")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write plots there")
    parser.add_argument(
        "--commit", help="for the header where there is no git; also LEANATTN_COMMIT"
    )
    kind.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.sets = options.sets or kind.default_sets
    if options.device.type == "cpu" and set(options.sets) != {"tiny"}:
        parser.error("--device cpu is to try the bench: it takes --set tiny alone")
    options.shapes = [
        (name, shape)
        for name, shape in shapes_of(options.sets, kind.all_sets)
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


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, got {text!r}")
    return int(text)


class Bench:
    """Measures shape after shape. A command derives from it: `measure` and what stands first."""

    name = description = None
    default_sets = None  # None: the user has to name one
    all_sets = {}  # what "all" stands for
    default_implementations = ()
    print_tables = None  # of rows

    @staticmethod
    def add_arguments(parser):
        """Those of this command alone."""

    def __init__(self, options, device):
        self.options, self.device = options, device
        self.implementations = [
            implementation
            for implementation in IMPLEMENTATIONS
            if any(fnmatch.fnmatch(implementation.name, pattern) for pattern in options.impl)
        ]
        self.shapes = options.shapes
        self.dtype = DTYPES[options.dtype]
        self.told = set()
        self.missing = {}  # implementation -> why it is not importable
        self.has_timed = False

    def run(self):
        """Yields the rows of each shape."""
        shapes = [shape for _, shape in self.shapes]
        self.pool = Pool(shapes, self.dtype, self.device, self.options.memory * 2**30)
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
                    case = self.case(shape)
                except MemoryError as error:
                    print(f"{set_name} {shape.name}: skipped: {error}", flush=True)
                    continue
                columns = shape_columns(set_name, shape) | {"run": run}
                results = self.measure(case)
                yield [Row(**columns, implementation=n, **r) for n, r in results.items()]

    def case(self, shape):
        return self.pool.case(shape)

    def measure(self, case):
        """{implementation: the remaining columns of `Row`}"""
        raise NotImplementedError

    def prepare(self, case, expected):
        """Each implementation's columns so far, and {name: (implementation, prepared)} of those
        whose answer is right, by `expected`, the case's Truth."""
        results, prepared = {}, {}
        for implementation in self.implementations:
            name = implementation.name
            if name in self.missing:
                results[name] = {"reason": self.missing[name]}
                continue
            made, out = try_call(implementation, case)
            if made is None:
                self.refuse(case, name, out, results)
            elif self.is_right(case, name, out, expected, results):
                prepared[name] = (implementation, made)
        return results, prepared

    def is_right(self, case, name, out, expected, results):
        """Of `out` `[B, Sq, Hq, Dv]`; its error goes to `results`, and the reason if it is not."""
        error = expected.error(out)
        results.setdefault(name, {})["error"] = error
        if error <= TOLERANCE:
            return True
        self.refuse(case, name, f"wrong answer, relative error {error:.2g}", results)  # NaN too
        return False

    def refuse(self, case, name, reason, results):
        results.setdefault(name, {})["reason"] = reason
        if (name, reason) not in self.told:
            self.told.add((name, reason))
            print(f"{name}: {reason} (first at {case.shape.name})", flush=True)
        if reason.startswith("not importable"):
            self.missing[name] = reason
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # raises if that call broke the device for all that follow

    def floors(self, case):
        """{name: (context, call)}; none on the CPU."""
        if self.device.type == "cpu":
            return {}

        def floor(inputs):
            torch.ops.leanattn.read_floor(inputs.k_visible, inputs.v_visible, self.sink)

        def rows_floor(inputs):
            torch.ops.leanattn.read_rows_floor(inputs.k_cache, inputs.v_cache, self.sink)

        floors = {FLOOR: (contextlib.nullcontext, floor)}
        if case.shape.has_short_rows and torch.cuda.get_device_capability(self.device) >= (9, 0):
            # That floor is of bulk copies alone.
            floors[ROWS_FLOOR] = (lambda: environment(LEANATTN_LOADER="tma"), rows_floor)
        return floors

    def capture(self, case, calls, sets, results):
        """{name: what `time` takes} of {name: (context, call)}. Who cannot be captured is refused
        in `results`."""
        if self.device.type == "cpu":
            return {name: call for name, (_, call) in calls.items()}
        graphs = {}
        for name, (context, call) in calls.items():
            try:
                with context():
                    graphs[name] = timing.CudaGraph(call, sets)
            except Exception as error:  # whatever a library raises is its reason
                reason = f"cannot be captured in a CUDA graph: {reason_of(error)}"
                self.refuse(case, name, reason, results)
        return graphs

    def time(self, captured, sets):
        """{name: Times}"""
        if self.device.type == "cpu":
            return timing.cpu_times(captured, sets)
        if not self.has_timed:  # the first times of a process are higher
            self.has_timed = True
            timing.graph_times(captured)
        return timing.graph_times(captured)

    def time_alone(self, case, prepared, results):
        """Fills in the columns of graphs of nothing but this call, the floor among them."""
        calls = {name: (i.context, p.call) for name, (i, p) in prepared.items()}
        graphs = self.capture(case, self.floors(case) | calls, case.sets, results)
        for name, times in self.time(graphs, case.sets).items():
            results.setdefault(name, {}).update(
                us=times.median, us_quartile1=times.quartile1, us_quartile3=times.quartile3,
                rounds=times.rounds, calls=times.calls,
            )  # fmt: skip


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
