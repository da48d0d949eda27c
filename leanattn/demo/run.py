"""The demo: one ragged batch, decoded by leanattn in one call and by torch SDPA one sequence after
another; errors against fp64, times, and the schedule of that very batch."""

import functools
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Callable, Optional

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import leanattn
from leanattn.demo.info import cuda_problem, device_name
from leanattn.demo.timing import EAGER, median_seconds

_HEADS_Q, _HEADS_KV, _HEAD_DIM = 32, 8, 128
_LENGTHS = {
    "cuda": [17, 100000, 1000, 331, 65536, 4096, 129, 30000, 12345, 777, 50021, 8191],
    "cpu": [17, 4000, 1000, 331, 2500, 64, 129, 3000, 512, 777, 1999, 40],
}
_DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
_SDPA_BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "Flash": SDPBackend.FLASH_ATTENTION,
    "Efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass
class Batch:
    """One step of decoding: a query a sequence, on caches that hold more than its tokens."""

    lengths: list
    q: torch.Tensor  # [B, Hq, D]
    k_cache: torch.Tensor  # [B, S, Hkv, D]
    v_cache: torch.Tensor  # [B, S, Hkv, D]
    cache_seqlens: torch.Tensor  # [B] int32

    @property
    def visible_elements(self):
        """Elements of K that the queries see, of V likewise."""
        return sum(self.lengths) * _HEADS_KV * _HEAD_DIM

    @property
    def visible_bytes(self):
        """Bytes of the K and V rows that the queries see."""
        return 2 * self.visible_elements * self.k_cache.element_size()

    def keys_and_values(self, seq):
        """K and V of one sequence, both [Hkv, tokens, D]."""
        length = self.lengths[seq]
        return (cache[seq, :length].transpose(0, 1) for cache in (self.k_cache, self.v_cache))


@dataclass
class Row:
    """One line of the table."""

    name: str
    call: Callable
    error: Optional[float] = None  # largest absolute difference from fp64
    seconds: float = 0.0
    how: str = ""  # the time was taken


def run_demo(options):
    """Prints the table and the schedule; returns the exit code, 1 where leanattn's error is not
    about that of SDPA. `options`: what __main__ parsed."""
    device = options.device or torch.device("cpu" if cuda_problem() else "cuda")
    if device.type == "cpu":
        if torch.cuda.is_available() and options.device is None:
            print(f"leanattn: {cuda_problem()}: the demo runs on the CPU", file=sys.stderr)
        return _run(options, device)
    if problem := cuda_problem():
        raise RuntimeError(problem)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise RuntimeError(f"there is no {device}, only {torch.cuda.device_count()} CUDA device(s)")
    with torch.cuda.device(index):
        return _run(options, torch.device("cuda", index))


def _run(options, device):
    batch = make_batch(options.lengths or _LENGTHS[device.type], device, _DTYPES[device.type])
    expected = fp64_attention(batch)
    ours = Row("leanattn, one call", lambda: _decode(batch))
    ours.error = _largest_error(ours, expected)
    peers = _peers(batch, expected, device)
    floor = [_read_floor(batch, device)] if device.type == "cuda" else []
    rows = [ours, *peers, *floor]
    for row, (seconds, how) in zip(rows, median_seconds([row.call for row in rows], device)):
        row.seconds, row.how = seconds, how
    _print_table(batch, device, ours, _fastest_of_each_form(peers), *floor)

    limit = _error_limit(batch, expected, peers)
    right = ours.error <= limit
    if not right:
        print(f"WRONG: an error of {ours.error:.1e} is more than {limit:.1e}", file=sys.stderr)
    _show_schedule(options, batch, device)
    return 0 if right else 1


def make_batch(lengths, device, dtype):
    """A `Batch` of normally distributed numbers, the same in every run on a device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    cache = (len(lengths), max(lengths), _HEADS_KV, _HEAD_DIM)
    return Batch(
        lengths=lengths,
        q=normal(len(lengths), _HEADS_Q, _HEAD_DIM),
        k_cache=normal(*cache),
        v_cache=normal(*cache),
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=device),
    )


# --- What is compared -----------------------------------------------------------------------------


def _decode(batch):
    return torch.ops.leanattn.decode(batch.q, batch.k_cache, batch.v_cache, batch.cache_seqlens)


def _sdpa_grouped(batch):
    """SDPA with the heads as they are, [1, Hq, 1, D]: a list of outputs."""
    outputs = []
    for seq in range(len(batch.lengths)):
        k, v = batch.keys_and_values(seq)
        q = batch.q[seq].view(1, _HEADS_Q, 1, _HEAD_DIM)
        outputs.append(scaled_dot_product_attention(q, k[None], v[None], enable_gqa=True))
    return outputs


def _sdpa_folded(batch):
    """SDPA with the query heads of a group as rows of one head, [1, Hkv, group, D]: the same
    attention, since a single query sees every key."""
    outputs = []
    for seq in range(len(batch.lengths)):
        k, v = batch.keys_and_values(seq)
        q = batch.q[seq].view(1, _HEADS_KV, _HEADS_Q // _HEADS_KV, _HEAD_DIM)
        outputs.append(scaled_dot_product_attention(q, k[None], v[None]))
    return outputs


_SDPA_FORMS = {"SDPA, enable_gqa": _sdpa_grouped, "SDPA, group as rows": _sdpa_folded}


def fp64_attention(batch):
    """The truth, [B, Hq, D] in fp64."""
    outputs = []
    for seq in range(len(batch.lengths)):
        k, v = (x.double() for x in batch.keys_and_values(seq))
        q = batch.q[seq].double().view(_HEADS_KV, -1, _HEAD_DIM)
        weights = (q @ k.transpose(1, 2) * _HEAD_DIM**-0.5).softmax(-1)
        outputs.append((weights @ v).view(_HEADS_Q, _HEAD_DIM))
    return torch.stack(outputs)


# --- Measuring ------------------------------------------------------------------------------------


def _largest_error(row, expected):
    result = row.call()
    out = torch.cat(result) if isinstance(result, list) else result
    return (out.reshape(expected.shape).double() - expected).abs().max().item()


def _peers(batch, expected, device):
    """SDPA in both forms, on CUDA by each of its backends that takes such a call."""
    backends = _SDPA_BACKENDS if device.type == "cuda" else {"": None}
    rows = []
    for form in _SDPA_FORMS:
        for name, backend in backends.items():
            row = Row(f"{form} ({name})" if name else form,
                      functools.partial(_call_sdpa, form, backend, batch))  # fmt: skip
            try:
                row.error = _largest_error(row, expected)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                continue
            rows.append(row)
    return rows


def _call_sdpa(form, backend, batch):
    if backend is None:
        return _SDPA_FORMS[form](batch)
    with sdpa_kernel(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backend that refuses tells all its reasons
        return _SDPA_FORMS[form](batch)


def _fastest_of_each_form(peers):
    groups = ([row for row in peers if row.name.startswith(form)] for form in _SDPA_FORMS)
    return [min(rows, key=lambda row: row.seconds) for rows in groups if rows]


def _read_floor(batch, device):
    """To read as many bytes as the queries see, of the same memory, and do nothing else."""
    n = batch.visible_elements
    k, v = (cache.view(-1)[:n] for cache in (batch.k_cache, batch.v_cache))
    sink = torch.zeros(1, dtype=torch.int32, device=device)
    return Row("read floor", lambda: torch.ops.leanattn.read_floor(k, v, sink))


def _error_limit(batch, expected, peers):
    """Twice the error of SDPA and a rounding more: a wrong answer is far beyond it."""
    rounding = torch.finfo(batch.q.dtype).eps * expected.abs().max().item()
    return 2 * min((peer.error for peer in peers), default=rounding) + 2 * rounding


# --- Printing -------------------------------------------------------------------------------------


def _print_table(batch, device, ours, peers, floor=None):
    dtype = str(batch.q.dtype).removeprefix("torch.")
    title = (
        f"{device_name(device)}\n{len(batch.lengths)} sequences of {min(batch.lengths)} to "
        f"{max(batch.lengths)} tokens, {_HEADS_Q}/{_HEADS_KV} heads, D={_HEAD_DIM}, {dtype}"
    )
    header = ["", "max error", "time", "GB/s"] + (["of floor"] if floor else [])
    lines = []
    for row in [ours, *peers] + ([floor] if floor else []):
        error = "" if row.error is None else f"{row.error:.1e}"
        line = [row.name, error, _time_text(row), f"{batch.visible_bytes / row.seconds / 1e9:.1f}"]
        lines.append(line + ([f"{100 * floor.seconds / row.seconds:.1f}%"] if floor else []))
    print_table(title, header, lines)
    print("Errors are against fp64. SDPA: torch's, one sequence after another.")
    print(f"Times: warm, {ours.how}.")
    if not peers:
        print("SDPA took no such call, so there is nothing to compare with.")
    if any(peer.how == EAGER for peer in peers):
        print("* eager calls: these could not be captured in a CUDA graph.")
    if floor and batch.visible_bytes < 4 * torch.cuda.get_device_properties(device).L2_cache_size:
        print("So small a batch stays in the L2 cache: these are not times of reading memory.")


def _time_text(row):
    mark = "*" if row.how == EAGER else ""
    time = f"{row.seconds * 1e3:.2f} ms" if row.seconds >= 1e-3 else f"{row.seconds * 1e6:.1f} us"
    return time + mark


def print_table(title, header, lines):
    """With rich where it is installed, else in plain text."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        print(title)
        for line in [header, *lines]:
            cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]
            print("  ".join(cells).rstrip())
        return
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        min_width=max(len(line) for line in title.splitlines()),
    )  # fmt: skip
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def _show_schedule(options, batch, device):
    cpu = device.type == "cpu"
    units = torch.get_num_threads() if cpu else torch.ops.leanattn.max_units(device.index)
    schedule = leanattn.schedule(
        batch.lengths, _HEADS_Q, _HEADS_KV, _HEAD_DIM,
        capacity=batch.k_cache.shape[1],
        num_units=int(os.environ.get("LEANATTN_NUM_UNITS") or units),
        rows_per_item=64 if cpu else None,
    )  # fmt: skip
    print(f"\nThe schedule of this batch:\n{schedule.text()}")
    if options.no_picture:
        return
    path = options.picture or "leanattn-schedule.png"
    try:
        schedule.plot(path)
    except ImportError as error:
        if options.picture:
            raise
        print(f"No picture: {error}", file=sys.stderr)
        return
    print(f"Its picture: {path}")
