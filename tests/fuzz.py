"""A fuzzer of decode: random calls from the whole argument space, held against fp64.

    python tests/fuzz.py --cases 5000 --device cuda --jobs 8     many cases, and a table
    python tests/fuzz.py --seed 0 --case 17 --device cuda        one of them again

A case is made from (seed, number, device) alone; see fuzz_case.py.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import sys
import time

import torch
from fuzz_case import INT32_MAX, Memory, build, dense, draw, take_back_last_rows
from reference import assert_close, assert_same_bits

import leanattn

FEATURES = {
    **{dtype: lambda case, dtype=dtype: case.dtype == dtype for dtype in ("fp16", "bf16", "fp32")},
    **{op: lambda case, op=op: case.op == op for op in
       ("decode", "decode_with_lse", "decode_out", "decode_with_lse_out")},
    "D != Dv": lambda case: case.dims[0] != case.dims[1],
    "D not a multiple of 16": lambda case: case.dims[0] % 16 != 0,
    "D or Dv not a multiple of 8": lambda case: any(dim % 8 for dim in case.dims),
    "D > 128": lambda case: case.dims[0] > 128,
    "MHA": lambda case: case.heads[0] == case.heads[1],
    "odd group": lambda case: case.heads[0] // case.heads[1] in (3, 5, 7, 17, 71),
    "group > 16": lambda case: case.heads[0] // case.heads[1] > 16,
    "q 3-D": lambda case: case.seqlen_q is None and case.offsets is None,
    "several queries": lambda case: (case.seqlen_q or 0) > 1,
    "ragged queries": lambda case: case.offsets is not None,
    "corrupted offsets": lambda case: case.offsets is not None and (
        case.offsets[0] != 0 or sorted(case.offsets) != list(case.offsets)
        or case.offsets[-1] > case.total_q),
    "max_seqlen_q": lambda case: case.max_seqlen_q is not None,
    "contiguous": lambda case: case.page_size is None,
    "paged": lambda case: case.page_size is not None,
    "page size 1": lambda case: case.page_size == 1,
    "page size not a multiple of 8": lambda case: (case.page_size or 8) % 8 != 0,
    "shuffled pages": lambda case: case.table == "shuffled",
    "shared pages": lambda case: case.table in ("shared prefix", "one row for all"),
    "corrupted table": lambda case: case.table == "corrupted",
    "no cache_seqlens": lambda case: case.lengths is None,
    "empty sequence": lambda case: 0 in (case.lengths or ()),
    "length is the capacity": lambda case: case.capacity in (case.lengths or ()),
    "length beyond": lambda case: any(n > case.max_length for n in case.lengths or ()),
    "negative length": lambda case: any(n < 0 for n in case.lengths or ()),
    "longer than a tile": lambda case: any(128 < n < INT32_MAX for n in case.lengths or ()),
    "zero size": lambda case: 0 in (case.batch, case.seqlen_q, case.capacity, case.total_q),
    "strided q": lambda case: unlike_plain(case.q_layout),
    "strided cache": lambda case: unlike_plain(case.k_layout),
    "strided out": lambda case: unlike_plain(case.out_layout) and case.op.endswith("out"),
    "heads before tokens": lambda case: case.k_layout.order == (0, 2, 1),
    "stride 0": lambda case: case.k_layout.expanded is not None or
                             case.q_layout.expanded is not None,
    "junk strides": lambda case: case.k_layout.junk_stride is not None and
                                 1 in (case.batch, case.heads[1], case.capacity),
    "K and V in one row": lambda case: case.packing == "one row",
    "K and V heads packed": lambda case: "heads" in case.packing,
    "V in K": lambda case: case.packing == "V in K",
    "strided small tensors": lambda case: case.small_strides,
    "scale 0": lambda case: case.softmax_scale == 0,
    "negative scale": lambda case: (case.softmax_scale or 0) < 0,
    "large scale": lambda case: (case.softmax_scale or 0) >= 1,
    "not causal": lambda case: not case.causal,
    "window_left": lambda case: case.window_left >= 0,
    "window_right": lambda case: case.window_right >= 0 and not case.causal,
    "huge window": lambda case: case.window_left >= INT32_MAX,
    "softcap": lambda case: case.softcap != 0,
    "ALiBi [Hq]": lambda case: case.alibi == "heads",
    "ALiBi [B, Hq]": lambda case: case.alibi == "batch",
    "sinks": lambda case: case.sinks is not None,
    "three options and more": lambda case: 3 <= sum(
        (case.window_left >= 0, case.softcap != 0, case.alibi is not None, case.sinks is not None,
         case.softmax_scale is not None, case.offsets is not None, case.page_size is not None)),
    "float8 e4m3": lambda case: case.cache_dtype == "e4m3",
    "float8 e5m2": lambda case: case.cache_dtype == "e5m2",
    "float8 scales": lambda case: case.scales is not None,
    "batch_invariant": lambda case: case.batch_invariant,
    "append_kv": lambda case: case.appended is not None,
    "append_kv, ragged": lambda case: len(set(case.appended or ())) > 1,
    "over ranks": lambda case: case.ranks is not None,
    "over ranks, several queries": lambda case: case.ranks is not None and
                                                case.total_q > case.batch,
    "over ranks, append_kv": lambda case: case.ranks is not None and case.appended is not None,
    "counters": lambda case: case.counters,
    "forced units": lambda case: case.units is not None,
    "forced teams": lambda case: "teams" in (case.layout or ""),
    "forced clusters": lambda case: "clusters" in (case.layout or ""),
    "poison": lambda case: case.poison is not None,
    "needles": lambda case: case.needles > 0,
    "visible NaN": lambda case: any("nan" in kind for kind in case.specials),
    "visible infinity": lambda case: "v inf" in case.specials,
}  # fmt: skip


def unlike_plain(layout):
    return any(layout.before) or layout.order != tuple(sorted(layout.order))


def decode_with_lse(**arguments):
    """What the fuzzer tests, unless it is given something else."""
    return torch.ops.leanattn.decode_with_lse(**arguments)


def append_kv(**arguments):
    """Likewise; writes into the caches."""
    torch.ops.leanattn.append_kv(**arguments)


@contextlib.contextmanager
def environment(case):
    """The variables that force units, layout, loader and pairs of heads, for one case."""
    layout = case.layout
    if layout and layout.startswith("clusters") and torch.cuda.get_device_capability()[0] < 9:
        layout = None
    forced = {
        "LEANATTN_NUM_UNITS": case.units,
        "LEANATTN_LAYOUT": layout,
        "LEANATTN_LOADER": case.loader,
        "LEANATTN_HEAD_PAIRS": case.head_pairs,
    }
    before = {name: os.environ.pop(name, None) for name in forced}
    os.environ.update({name: str(value) for name, value in forced.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def storage(tensor):
    """All of the memory that a view lies in, `[n]`."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def moved(arguments, device):
    """Copies of the tensors with their strides; what shared memory shares it again."""
    copies = {}
    result = dict(arguments)
    for name, tensor in arguments.items():
        if isinstance(tensor, torch.Tensor):
            memory = storage(tensor)
            # Empty memory has no address.
            key = memory.data_ptr() or name
            copy = copies.setdefault(key, memory.to(device, copy=True))
            result[name] = copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return result


def assert_inputs_unchanged(arguments, before):
    """All of their memory has the bits it was made with; what append_kv brought back too, but that
    a float8 NaN may be another."""

    def bits(tensor):
        memory = storage(tensor).cpu()
        return memory.float().nan_to_num(-7.0) if memory.element_size() == 1 else memory

    for name, tensor in before.items():
        if isinstance(tensor, torch.Tensor):
            try:
                assert_same_bits(bits(arguments[name]), bits(tensor))
            except AssertionError as error:
                raise AssertionError(f"{name} is not as it was made: {error}") from None


def output_memory(case, arguments, device):
    """(out, lse, and a check that nothing beside them was written)."""
    q, marker = arguments["q"], 7.0
    shape = (*q.shape[:-1], case.dims[1])
    out = Memory(shape, case.out_layout, q.dtype, marker).view
    lse = torch.full((*q.shape[:-1], 3 if case.small_strides else 1), marker)[..., -1]
    out, lse = moved({"out": out, "lse": lse}, device).values()

    def assert_only_output_written():
        for name, tensor in (("out", out), ("lse", lse)):
            memory = storage(tensor).clone()
            memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(marker)
            assert (memory == marker).all(), f"the op has written beside {name}"

    return out, lse, assert_only_output_written


def call_variant(case, arguments, device):
    """(out, lse or None) of the case's op."""
    op = getattr(torch.ops.leanattn, case.op)
    if case.op == "decode":
        return op(**arguments), None
    if case.op == "decode_with_lse":
        return op(**arguments)
    out, lse, assert_only_output_written = output_memory(case, arguments, device)
    if case.op == "decode_out":
        op(**arguments, out=out)
        assert_only_output_written()
        return out, None
    op(**arguments, out=out, lse=lse)
    assert_only_output_written()
    return out, lse


def assert_same_under_other_units(case, arguments, out, lse):
    units = 7 if case.units == 3 else 3
    with environment(dataclasses.replace(case, units=units, layout=None)):
        again_out, again_lse = decode_with_lse(**arguments)
    assert_same_bits(again_out, out)
    assert_same_bits(again_lse, lse)


def check(case, implementation=decode_with_lse, append=append_kv):
    """Raises what is wrong: AssertionError, or whatever the op itself raised."""
    inputs = build(case)
    arguments = moved(inputs, case.device)
    if case.counters:
        arguments["counters"] = leanattn.counters(case.device, 1024)
    with environment(case):
        if case.appended is not None:
            append(**take_back_last_rows(case, inputs, arguments))
        out, lse = implementation(**arguments)
        assert_close(out.cpu(), lse.cpu(), **dense(inputs))
        assert_inputs_unchanged(arguments, inputs)
        if implementation is decode_with_lse:
            variant_out, variant_lse = call_variant(case, arguments, case.device)
            assert_same_bits(variant_out, out)
            if variant_lse is not None:
                assert_same_bits(variant_lse, lse)
            if case.batch_invariant:
                assert_same_under_other_units(case, arguments, out, lse)
        if case.counters:
            assert (arguments["counters"] == 0).all(), "counters are not zero after the call"


@dataclasses.dataclass
class Tally:
    """What came of many cases."""

    cases: int = 0
    passed: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    failures: list = dataclasses.field(default_factory=list)

    def add(self, other):
        self.cases += other.cases
        self.passed += other.passed
        self.failures += other.failures

    def table(self):
        """Counts of cases, and of those passed by feature."""
        lines = [f"{name:<32}{count:>7}" for name, count in (
            ("cases", self.cases), ("passed", self.passed["all"]), ("failed", len(self.failures)),
        )]  # fmt: skip
        lines.append("passed cases with")
        lines += [f"  {name:<30}{self.passed[name]:>7}" for name in FEATURES]
        return "\n".join(lines)


def describe(case, error):
    """The line that reproduces a failing case, its arguments, and where it goes wrong."""
    arguments = ", ".join(
        f"{field.name}={getattr(case, field.name)!r}" for field in dataclasses.fields(case)[3:]
    )
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    return (
        f"python tests/fuzz.py --seed {case.seed} --case {case.index} --device {case.device}\n"
        f"    {arguments}\n    {kind}{error}"
    )


@contextlib.contextmanager
def one_thread():
    """The tensors of a case are small: threads of torch would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def run(seed, indices, device="cpu", implementation=decode_with_lse, append=append_kv):
    """The Tally of these cases."""
    tally = Tally()
    for index in indices:
        case = draw(seed, index, device)
        tally.cases += 1
        try:
            check(case, implementation, append)
        except Exception as error:
            tally.failures.append(describe(case, error))
            if "CUDA error" in str(error):
                # The context is lost, and every call after this one would fail too.
                break
        else:
            tally.passed.update(["all", *(name for name, has in FEATURES.items() if has(case))])
    return tally


def main(run=run, devices=("cpu", "cuda")):
    """The program; `run` and the devices, of which the first is the default, of another one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=300, help="how many, from number 0 on")
    parser.add_argument("--case", type=int, help="this one only")
    parser.add_argument("--device", default=devices[0], choices=devices)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()

    start = time.perf_counter()
    if options.case is not None:
        tally = run(options.seed, [options.case], options.device)
    elif options.jobs == 1:
        tally = run(options.seed, range(options.cases), options.device)
    else:
        tally = Tally()
        # A CUDA context does not survive a fork.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.jobs, spawn) as pool:
            shares = [
                pool.submit(
                    run, options.seed, range(i, options.cases, options.jobs), options.device
                )
                for i in range(options.jobs)
            ]
            for share in concurrent.futures.as_completed(shares):
                tally.add(share.result())
    print(*tally.failures, sep="\n", end="\n" if tally.failures else "")
    if options.case is None:
        print(tally.table())
        print(f"{time.perf_counter() - start:.1f} s, seed {options.seed}, {options.device}")
    elif not tally.failures:
        print("passed")
    sys.exit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
