"""The fuzzer: what it finds, what it covers, and that it can fail."""

import collections
import math
import sys
from unittest import mock

import fuzz
import fuzz_case
import pytest
import reference
import torch

CASES_EACH = 50


@pytest.fixture(autouse=True)
def one_thread():
    with fuzz.one_thread():
        yield


@pytest.mark.parametrize("first", range(0, 300, CASES_EACH))
def test_random_cases(first, device):
    """Features in combinations that nobody thought of; tests/fuzz.py runs more of them."""
    tally = fuzz.run(0, range(first, first + CASES_EACH), device)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.passed["all"] == CASES_EACH


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_cases_cover_every_feature(name):
    """A feature that no case has is not tested, whatever the count of cases says."""
    counts = collections.Counter()
    for index in range(400):
        case = fuzz_case.draw(0, index, name)
        counts.update(feature for feature, has in fuzz.FEATURES.items() if has(case))
    of_cpu, of_cuda = {"fp32"}, {"forced teams", "forced clusters"}
    expected = set(fuzz.FEATURES) - (of_cpu if name == "cuda" else of_cuda)
    rare = {feature: counts[feature] for feature in expected if counts[feature] < 5}
    assert not rare, f"fewer than 5 of 400 cases have {rare}"


def test_a_case_is_the_same_every_time():
    """One line reproduces a failure only if the numbers are the same, another seed's are not."""
    for index in range(20):
        case = fuzz_case.draw(3, index)
        assert case == fuzz_case.draw(3, index) != fuzz_case.draw(4, index)
        first, second = fuzz_case.build(case), fuzz_case.build(case)
        for name, tensor in first.items():
            if isinstance(tensor, torch.Tensor):
                assert tensor.stride() == second[name].stride()
                reference.assert_same_bits(tensor, second[name])


def test_cuda_cases_are_aligned():
    """Whole rows, strides and offsets of multiples of 16 bytes, of float8 of 8: what CUDA takes;
    multiples of 4 where a head dim is no multiple of 8."""
    for index in range(100):
        case = fuzz_case.draw(1, index, "cuda")
        arguments = fuzz_case.build(case)
        is_whole = all(dim % 8 == 0 for dim in case.dims)
        for name in ("q", "k_cache", "v_cache"):
            tensor = arguments[name]
            strides = [n for size, n in zip(tensor.shape, tensor.stride()) if size > 1]
            assert tensor.stride(-1) == 1
            grain = 8 if is_whole else 4 // tensor.element_size()
            assert all(n % grain == 0 for n in [tensor.storage_offset(), *strides[:-1]])


def truth(**arguments):
    """The reference in the op's place, rounded to the dtypes of its results."""
    out, lse = reference.reference(**fuzz_case.dense(arguments))
    return out.to(arguments["q"].dtype), lse.float()


def true_append(shift=0, clamp=False, ragged=True, **arguments):
    """append_kv in plain torch; what it is given besides the op's arguments breaks it."""
    block_table, offsets = arguments["block_table"], arguments.get("cu_seqlens")
    for sequence, length in enumerate(arguments["cache_seqlens"].tolist()):
        for name in ("k", "v"):
            cache, rows = arguments[f"{name}_cache"], arguments[name]
            scale = arguments.get(f"{name}_scale")
            if offsets is not None:
                begin, end = offsets[sequence : sequence + 2].tolist()
                rows = rows[begin:end] if ragged else rows[sequence : sequence + end - begin]
            else:
                rows = rows[sequence]
            if scale is not None:
                rows = rows / reference.scaled(torch.ones(*rows.shape[-2:]), scale, sequence)
            capacity, page_size = cache.shape[1], None
            if block_table is not None:
                page_size = cache.shape[1]
                capacity = block_table.shape[1] * page_size if len(cache) else 0
            ranks = [arguments[name] for name in fuzz_case.CONTEXT_PARALLEL if name in arguments]
            key_of = {
                token: key
                for key, token in enumerate(reference.own_tokens(capacity, *ranks)[0].tolist())
            }
            for i, row in enumerate(rows, length + shift):
                i = min(i, capacity - 1) if clamp else key_of.get(i, -1)
                if 0 <= i < capacity and page_size is None:
                    cache[sequence, i] = row
                elif 0 <= i < capacity:
                    cache[block_table[sequence, i // page_size], i % page_size] = row


@pytest.mark.parametrize("broken", [dict(shift=1), dict(clamp=True), dict(ragged=False)],
                         ids=lambda broken: next(iter(broken)))  # fmt: skip
def test_a_broken_append_is_caught(broken):
    """Rows one off, rows beyond the capacity written onto the last, offsets ignored."""

    def append(**arguments):
        true_append(**broken, **arguments)

    for index in range(300):
        tally = fuzz.run(0, [index], "cpu", truth, append)
        if tally.failures:
            assert (
                "_cache is not as it was made" in tally.failures[0] or "out[" in tally.failures[0]
            )
            return
    pytest.fail(f"append_kv with {broken} passes 300 cases")


def test_the_truth_passes():
    """Else a failure would say nothing. Pages and all, whether the library has them or not."""
    tally = fuzz.run(2, range(60), "cpu", truth, true_append)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.passed["all"] == 60


true_visible_range = reference.visible_range


def with_visible_range(changed):
    """The truth under another rule of visibility."""

    def implementation(**arguments):
        with mock.patch.object(reference, "visible_range", changed):
            return truth(**arguments)

    return implementation


def without_last_key(*arguments, **options):
    begin, end = true_visible_range(*arguments, **options)
    return begin, max(begin, end - 1)


def without_first_key(*arguments, **options):
    begin, end = true_visible_range(*arguments, **options)
    return min(begin + 1, end), end


def window_one_too_wide(length, seqlen_q, row, causal=True, window_left=-1, window_right=-1):
    window_left += window_left >= 0
    return true_visible_range(length, seqlen_q, row, causal, window_left, window_right)


def window_one_too_narrow(length, seqlen_q, row, causal=True, window_left=-1, window_right=-1):
    window_left -= window_left > 0
    return true_visible_range(length, seqlen_q, row, causal, window_left, window_right)


def queries_at_the_start(length, seqlen_q, row, *rules, **named_rules):
    """Position row + 1 - Sq + L of the wrong L: causal as if all queries saw the last key."""
    return true_visible_range(length, seqlen_q, seqlen_q - 1, *rules, **named_rules)


def next_page(**arguments):
    if arguments.get("block_table") is not None:
        arguments["block_table"] = arguments["block_table"].roll(1, dims=1)
    return truth(**arguments)


def table_entries_wrapped(**arguments):
    if arguments.get("block_table") is not None:
        num_pages = arguments["k_cache"].shape[0]
        arguments["block_table"] = arguments["block_table"] % max(1, num_pages)
    return truth(**arguments)


def length_one_beyond_capacity(**arguments):
    arguments = fuzz_case.dense(arguments)
    lengths = arguments.get("cache_seqlens")
    for name in ("k_cache", "v_cache"):
        cache = arguments[name]
        arguments[name] = torch.cat([cache, torch.zeros_like(cache[:, :1])], 1)
        if cache.shape[1] == 0:
            arguments[name] = cache.new_zeros(cache.shape[0], 1, *cache.shape[2:])
    if lengths is None:
        lengths = torch.full((cache.shape[0],), cache.shape[1], dtype=torch.int32)
    return truth(**{**arguments, "cache_seqlens": lengths.clamp(max=cache.shape[1] + 1)})


def next_kv_head(**arguments):
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].roll(1, dims=2)
    return truth(**arguments)


def without(*names):
    def implementation(**arguments):
        return truth(**{name: x for name, x in arguments.items() if name not in names})

    return implementation


def slopes_of_the_first_sequence(**arguments):
    slopes = arguments.get("alibi_slopes")
    if slopes is not None and slopes.dim() == 2:
        arguments["alibi_slopes"] = slopes[:1].expand_as(slopes)
    return truth(**arguments)


def lse_in_log2(**arguments):
    out, lse = truth(**arguments)
    return out, lse / math.log(2)


def nan_behind_the_length(**arguments):
    """A zero weight times NaN, where the last 16 keys are multiplied as one."""
    arguments = fuzz_case.dense(arguments)
    out, lse = truth(**arguments)
    q, v = arguments["q"], arguments["v_cache"]
    batch, capacity = v.shape[:2]
    lengths = reference.clamped_lengths(arguments.get("cache_seqlens"), batch, capacity)
    ranges = reference.query_ranges(q, batch, arguments.get("cu_seqlens_q"))
    rows = out.view(-1, *out.shape[-2:])
    for sequence, (length, (begin, end)) in enumerate(zip(lengths, ranges)):
        if length % 16 > 0:
            behind = v[sequence, length : length + 16 - length % 16]
            rows[begin:end] += (0 * behind.float()).sum().to(out.dtype)
    return out, lse


def nan_swallowed(**arguments):
    out, lse = truth(**arguments)
    return out.nan_to_num(0, torch.inf, -torch.inf), lse


def uncovered_rows_with_sinks(**arguments):
    out, lse = truth(**arguments)
    sinks = arguments.get("sinks")
    return out, lse if sinks is None else torch.where(lse == -torch.inf, sinks, lse)


def writes_to_its_input(**arguments):
    out, lse = truth(**arguments)
    if arguments["q"].numel() > 0:
        arguments["q"].select(0, 0).fill_(0)
    return out, lse


def next_rank(**arguments):
    ranks = arguments.get("cp_world_size", 1)
    return truth(**arguments | {"cp_rank": (arguments.get("cp_rank", 0) + 1) % ranks})


def distance_to_the_key(**arguments):
    """ALiBi's as if the keys of this rank stood side by side."""
    ranks, true_attend = arguments.get("cp_world_size", 1), reference.attend

    def attend(q, k, v, visible, distance, *others):
        return true_attend(q, k, v, visible, distance // ranks, *others)

    if ranks == 1:
        return truth(**arguments)
    with mock.patch.object(reference, "attend", attend):
        return truth(**arguments)


BROKEN = {
    "last-key-dropped": with_visible_range(without_last_key),
    "first-key-dropped": with_visible_range(without_first_key),
    "window-one-too-wide": with_visible_range(window_one_too_wide),
    "window-one-too-narrow": with_visible_range(window_one_too_narrow),
    "every-query-the-last": with_visible_range(queries_at_the_start),
    "page-off-by-one": next_page,
    "table-entries-wrapped": table_entries_wrapped,
    "length-beyond-the-capacity": length_one_beyond_capacity,
    "kv-head-off-by-one": next_kv_head,
    "sinks-forgotten": without("sinks"),
    "softcap-forgotten": without("softcap"),
    "scale-forgotten": without("softmax_scale"),
    "slopes-of-another-sequence": slopes_of_the_first_sequence,
    "lse-in-log2": lse_in_log2,
    "nan-leaks": nan_behind_the_length,
    "nan-swallowed": nan_swallowed,
    "sinks-in-uncovered-rows": uncovered_rows_with_sinks,
    "input-written": writes_to_its_input,
    "one-rank-only": without(*fuzz_case.CONTEXT_PARALLEL),
    "next-rank": next_rank,
    "distance-to-the-key": distance_to_the_key,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_library_is_caught(name):
    """Each mistake within 300 cases, most within 20, by a line that reproduces it."""
    for index in range(300):
        tally = fuzz.run(0, [index], "cpu", BROKEN[name], true_append)
        if tally.failures:
            line, arguments, message = tally.failures[0].splitlines()[:3]
            assert line == f"python tests/fuzz.py --seed 0 --case {index} --device cpu"
            assert "heads=" in arguments and not message.strip().startswith(("Index", "Type"))
            return
    pytest.fail(f"{name} passes 300 cases")


def test_what_is_written_beside_out_is_seen():
    """The first and the last number of the memory that out lies in, where out does not reach."""
    seen = 0
    for index in range(40):
        case = fuzz_case.draw(5, index)
        out, lse, assert_only_output_written = fuzz.output_memory(
            case, fuzz_case.build(case), "cpu"
        )
        out.fill_(1.0)
        assert_only_output_written()
        memory = fuzz.storage(out)
        untouched = memory != 1.0
        if untouched.any():
            memory[untouched.nonzero()[-1]] = 2.0
            with pytest.raises(AssertionError, match="beside out"):
                assert_only_output_written()
            seen += 1
    assert seen > 5


def test_the_script_with_several_processes(run_python):
    """Their tallies make one table."""
    many = run_python(fuzz.__file__, "--cases", "6", "--jobs", "2")
    assert many.returncode == 0, many.stdout + many.stderr
    assert many.stdout.splitlines()[0].split() == ["cases", "6"]


def test_the_script_runs_one_case(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--seed", "0", "--case", "1"])
    with pytest.raises(SystemExit) as exited:
        fuzz.main()
    assert exited.value.code == 0
    assert capsys.readouterr().out == "passed\n"


def test_the_script_fails_where_a_case_fails(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--cases", "12"])
    monkeypatch.setattr(fuzz, "check", mock.Mock(side_effect=AssertionError("out[0] is wrong")))
    with pytest.raises(SystemExit) as exited:
        fuzz.main()
    printed = capsys.readouterr().out
    assert exited.value.code == 1
    assert "python tests/fuzz.py --seed 0 --case 11 --device cpu\n" in printed
    assert "out[0] is wrong" in printed
