"""Every mistake that the host can see raises before anything runs, and the message helps.

It must name the op, the argument and the value that was given. `Wrong` describes one mistake: how
to make it from a good call, which argument names are right in the message, and which values.
"""

import re
from dataclasses import dataclass
from typing import Callable

import pytest
import torch
from cases import int32, make_case, offsets, sharp_dtype

import leanattn  # noqa: F401  (registers torch.ops.leanattn)


def good_call(device, **options):
    """B 2, Sq 3, 4 query heads, 2 KV heads, D 64, Dv 32, S 50."""
    return make_case(
        device, sharp_dtype(device), seqlen_q=3, dims=(64, 32), lengths=(50, 20), capacity=50,
        poison=None, **options,
    )  # fmt: skip


def ragged_call(device, **options):
    """The same with ragged queries of 3 and 2 rows."""
    return make_case(
        device, sharp_dtype(device), query_lengths=(3, 2), dims=(64, 32), lengths=(50, 20),
        capacity=50, poison=None, **options,
    )  # fmt: skip


def spelling(value):
    """How the value may be written in a message."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, float):
        return re.escape(repr(value)) + "0*"
    if isinstance(value, tuple):
        return re.escape(str(list(value)))
    return re.escape(str(value))


def assert_names(message, op, arguments, values):
    """The message holds the op, one of the argument names and every value, as words."""
    text = re.sub(r"\S*\.(cpp|cu|cuh|h|hpp|py)(:\d+)?\S*", "", message)
    text = text.split("C++ CapturedTraceback")[0]

    def holds(pattern):
        return re.search(rf"(?<![\w.-])({pattern})(?!\w|\.\d)", text, re.IGNORECASE)

    assert holds(rf"(leanattn(::|\.))?{op}"), f"the op {op} is not named: {message}"
    assert holds("|".join(arguments)), f"none of {arguments} is named: {message}"
    for value in values:
        assert holds(spelling(value)), f"the value {value} is not told: {message}"


def assert_refused(call, arguments, values, op="decode"):
    """Calling `op` with these keyword arguments raises, with a message that helps."""
    with pytest.raises((RuntimeError, ValueError)) as raised:
        getattr(torch.ops.leanattn, op)(**call)
    assert_names(str(raised.value), op, arguments, values)


@dataclass
class Wrong:
    change: Callable  # (call, device) -> the arguments that change
    arguments: tuple  # any of these is the right name
    values: tuple = ()  # all of these are told
    base: Callable = good_call


def cast(name, dtype):
    return lambda call, device: {name: call[name].to(dtype)}


def replace(**shapes):
    """Tensors of other shapes: zeros with the dtype of the argument they replace."""

    def change(call, device):
        return {
            name: torch.zeros(shape, dtype=call[name].dtype, device=device)
            for name, shape in shapes.items()
        }

    return change


def give(**values):
    return lambda call, device: values


def add(name, dtype, shape):
    return lambda call, device: {name: torch.zeros(shape, dtype=dtype, device=device)}


MISTAKES = {
    # dtype
    "q-float64": Wrong(cast("q", torch.float64), ("q",), (torch.float64,)),
    "q-int8": Wrong(cast("q", torch.int8), ("q",), (torch.int8,)),
    "k-cache-other-dtype": Wrong(cast("k_cache", torch.bfloat16), ("k_cache",), (torch.bfloat16,)),
    "v-cache-other-dtype": Wrong(cast("v_cache", torch.bfloat16), ("v_cache",), (torch.bfloat16,)),
    "cache-seqlens-int64": Wrong(
        cast("cache_seqlens", torch.int64), ("cache_seqlens",), (torch.int64,)
    ),
    "cache-seqlens-float": Wrong(
        cast("cache_seqlens", torch.float32), ("cache_seqlens",), (torch.float32,)
    ),
    "cu-seqlens-q-int64": Wrong(
        cast("cu_seqlens_q", torch.int64), ("cu_seqlens_q",), (torch.int64,), ragged_call
    ),
    "alibi-half": Wrong(
        add("alibi_slopes", torch.float16, (4,)), ("alibi_slopes",), (torch.float16,)
    ),
    "alibi-float64": Wrong(
        add("alibi_slopes", torch.float64, (4,)), ("alibi_slopes",), (torch.float64,)
    ),
    "sinks-bfloat16": Wrong(add("sinks", torch.bfloat16, (4,)), ("sinks",), (torch.bfloat16,)),
    # rank
    "q-2d": Wrong(replace(q=(4, 64)), ("q",), ((4, 64),)),
    "q-5d": Wrong(replace(q=(1, 2, 3, 4, 64)), ("q",), ((1, 2, 3, 4, 64),)),
    "q-2d-ragged": Wrong(replace(q=(5, 64)), ("q",), ((5, 64),), ragged_call),
    "q-4d-with-cu-seqlens-q": Wrong(
        replace(q=(2, 3, 4, 64)), ("q", "cu_seqlens_q"), ((2, 3, 4, 64),), ragged_call
    ),
    "k-cache-3d": Wrong(replace(k_cache=(50, 2, 64)), ("k_cache",), ((50, 2, 64),)),
    "k-cache-5d": Wrong(replace(k_cache=(1, 2, 50, 2, 64)), ("k_cache",), ((1, 2, 50, 2, 64),)),
    "v-cache-3d": Wrong(replace(v_cache=(50, 2, 32)), ("v_cache",), ((50, 2, 32),)),
    "cache-seqlens-0d": Wrong(replace(cache_seqlens=()), ("cache_seqlens",), ((),)),
    "cache-seqlens-2d": Wrong(replace(cache_seqlens=(2, 1)), ("cache_seqlens",), ((2, 1),)),
    "cu-seqlens-q-2d": Wrong(
        replace(cu_seqlens_q=(3, 1)), ("cu_seqlens_q",), ((3, 1),), ragged_call
    ),
    "alibi-3d": Wrong(
        add("alibi_slopes", torch.float32, (1, 2, 4)), ("alibi_slopes",), ((1, 2, 4),)
    ),
    "sinks-2d": Wrong(add("sinks", torch.float32, (2, 4)), ("sinks",), ((2, 4),)),
    # shape
    "q-batch": Wrong(replace(q=(7, 3, 4, 64)), ("q", "k_cache"), (7, 2)),
    "q-batch-3d": Wrong(replace(q=(7, 4, 64)), ("q", "k_cache"), (7, 2)),
    "v-cache-batch": Wrong(replace(v_cache=(7, 50, 2, 32)), ("v_cache",), (7, 2)),
    "v-cache-tokens": Wrong(replace(v_cache=(2, 51, 2, 32)), ("v_cache",), (51, 50)),
    "v-cache-heads": Wrong(replace(v_cache=(2, 50, 1, 32)), ("v_cache",), (1, 2)),
    "q-head-dim": Wrong(replace(q=(2, 3, 4, 72)), ("q", "k_cache"), (72, 64)),
    "heads-not-a-multiple": Wrong(replace(q=(2, 3, 5, 64)), ("q", "k_cache"), (5, 2)),
    "fewer-heads-than-kv-heads": Wrong(replace(q=(2, 3, 1, 64)), ("q", "k_cache"), (1, 2)),
    "no-heads": Wrong(replace(q=(2, 3, 0, 64)), ("q", "k_cache"), (0,)),
    "no-kv-heads": Wrong(
        replace(k_cache=(2, 50, 0, 64), v_cache=(2, 50, 0, 32)), ("k_cache",), (0,)
    ),
    "cache-seqlens-too-long": Wrong(replace(cache_seqlens=(3,)), ("cache_seqlens",), (3, 2)),
    "cache-seqlens-too-short": Wrong(replace(cache_seqlens=(1,)), ("cache_seqlens",), (1, 2)),
    "cu-seqlens-q-too-short": Wrong(
        replace(cu_seqlens_q=(2,)), ("cu_seqlens_q",), (2, 3), ragged_call
    ),
    "cu-seqlens-q-too-long": Wrong(
        replace(cu_seqlens_q=(4,)), ("cu_seqlens_q",), (4, 3), ragged_call
    ),
    "cu-seqlens-q-empty": Wrong(replace(cu_seqlens_q=(0,)), ("cu_seqlens_q",), (0, 3), ragged_call),
    "alibi-heads": Wrong(add("alibi_slopes", torch.float32, (2,)), ("alibi_slopes",), (2, 4)),
    "alibi-batch": Wrong(add("alibi_slopes", torch.float32, (3, 4)), ("alibi_slopes",), (3, 2)),
    "alibi-one": Wrong(add("alibi_slopes", torch.float32, (1,)), ("alibi_slopes",), (1, 4)),
    "sinks-heads": Wrong(add("sinks", torch.float32, (2,)), ("sinks",), (2, 4)),
    # head dims
    "head-dim-0": Wrong(replace(q=(2, 3, 4, 0), k_cache=(2, 50, 2, 0)), ("q", "k_cache"), (0, 576)),
    "head-dim-584": Wrong(
        replace(q=(2, 3, 4, 584), k_cache=(2, 50, 2, 584)), ("q", "k_cache"), (584, 576)
    ),
    "value-head-dim-0": Wrong(replace(v_cache=(2, 50, 2, 0)), ("v_cache",), (0, 512)),
    "value-head-dim-520": Wrong(replace(v_cache=(2, 50, 2, 520)), ("v_cache",), (520, 512)),
    # scalars
    "softcap-negative": Wrong(give(softcap=-1.5), ("softcap",), (-1.5,)),
    "softcap-nan": Wrong(give(softcap=float("nan")), ("softcap",), ("nan",)),
    "softcap-inf": Wrong(give(softcap=float("inf")), ("softcap",), ("inf",)),
    "scale-nan": Wrong(give(softmax_scale=float("nan")), ("softmax_scale",), ("nan",)),
    "scale-inf": Wrong(give(softmax_scale=-float("inf")), ("softmax_scale",), ("-inf",)),
    "window-left": Wrong(give(window_left=-2), ("window_left",), (-2,)),
    "window-left-int-min": Wrong(give(window_left=-(2**63)), ("window_left",), (-(2**63),)),
    "window-left-int32-wrap": Wrong(give(window_left=-(2**32)), ("window_left",), (-(2**32),)),
    "window-right": Wrong(give(window_right=-2, causal=False), ("window_right",), (-2,)),
    "window-right-under-causal": Wrong(give(window_right=1), ("window_right",), (1,)),
    "window-right-wraps-to-0": Wrong(give(window_right=2**32), ("window_right",), (2**32,)),
    "hint-without-ragged-queries": Wrong(give(max_seqlen_q=3), ("max_seqlen_q",), (3,)),
    "hint-negative": Wrong(give(max_seqlen_q=-4), ("max_seqlen_q",), (-4,), ragged_call),
    # counters
    "counters-int64": Wrong(add("counters", torch.int64, (256,)), ("counters",), (torch.int64,)),
    "counters-float": Wrong(
        add("counters", torch.float32, (256,)), ("counters",), (torch.float32,)
    ),
    "counters-2d": Wrong(add("counters", torch.int32, (256, 2)), ("counters",), ((256, 2),)),
    "counters-empty": Wrong(add("counters", torch.int32, (0,)), ("counters",), (0,)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, device):
    """One wrong argument in an otherwise good call."""
    wrong = MISTAKES[name]
    call = wrong.base(device)
    assert_refused({**call, **wrong.change(call, device)}, wrong.arguments, wrong.values)


@pytest.mark.parametrize("name, value, allowed", [
    ("cache_seqlens", [50, 20], "a tensor or None"),
    ("cache_seqlens", 50, "a tensor or None"),
    ("block_table", [[0], [1]], "a tensor or None"),
    ("k_cache", "k", "a tensor"),
    ("window_left", 3.5, "an int"),
    ("max_seqlen_q", 2.5, "an int or None"),
    ("softmax_scale", "1", "a float or None"),
    ("causal", "yes", "a bool"),
    ("cu_seqlens_q", (0, 3, 5), "a tensor or None"),
])  # fmt: skip
@pytest.mark.parametrize("function", ["decode", "is_supported"])
def test_an_argument_of_a_wrong_type(function, name, value, allowed, device):
    """One line of what is wrong, not the whole schema."""
    call = {**good_call(device), name: value}
    message = re.escape(f"{name} must be {allowed}, got {value!r}, of type {type(value).__name__}")
    if function == "is_supported":
        supported, reason = leanattn.is_supported(**call)
        assert not supported and re.search(message, reason)
    else:
        with pytest.raises(RuntimeError, match=f"^leanattn::decode: {message}$"):
            leanattn.decode(**call)


def test_an_array_is_no_tensor(device):
    """Nor is an integer of numpy's, where an int would do, anything but one."""
    numpy = pytest.importorskip("numpy")
    call = good_call(device)
    with pytest.raises(RuntimeError, match="cache_seqlens must be a tensor or None, got array"):
        leanattn.decode(**{**call, "cache_seqlens": numpy.array([50, 20], dtype=numpy.int32)})
    call["window_left"] = 7
    expected = leanattn.decode(**call)
    for integer in (numpy.int32, numpy.int64, numpy.uint8):
        assert torch.equal(leanattn.decode(**{**call, "window_left": integer(7)}), expected)


def test_too_few_counters(device, force_units):
    """A ticket beyond the end of the counters would be drawn from somebody else's memory."""
    force_units(64)
    call = good_call(device, counters=torch.zeros(1, dtype=torch.int32, device=device))
    assert_refused(call, ("counters",), (1,))


@pytest.mark.parametrize("name, value", [("softcap", 1e300), ("softmax_scale", -1e300)])
def test_scalars_beyond_fp32_are_not_silently_infinite(name, value, device):
    """A finite double that is no finite float: refused like infinity is."""
    assert_refused(good_call(device, **{name: value}), (name,), ())


@pytest.mark.parametrize("op", ["decode", "decode_with_lse", "decode_out", "decode_with_lse_out"])
def test_each_op_checks_and_names_itself(op, device):
    """All four check the same, under their own names."""
    call = good_call(device, window_left=-7)
    if op.endswith("_out"):
        call["out"] = torch.empty(2, 3, 4, 32, dtype=call["q"].dtype, device=device)
    if op == "decode_with_lse_out":
        call["lse"] = torch.empty(2, 3, 4, device=device)
    assert_refused(call, ("window_left",), (-7,), op)


def test_the_python_wrapper_checks_too(device):
    """leanattn.decode adds no other kind of error in front."""
    with pytest.raises((RuntimeError, ValueError)) as raised:
        leanattn.decode(**good_call(device, window_left=-7))
    assert_names(str(raised.value), "decode", ("window_left",), (-7,))


def test_the_message_says_what_is_allowed(device):
    """Head dims, dtypes and causal windows are told with the mistake."""
    call = good_call(device)
    for change, allowed in (
        (MISTAKES["head-dim-584"].change(call, device), "576"),
        (MISTAKES["q-int8"].change(call, device), "(?i)bfloat16"),
        ({"window_right": 3}, "causal"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=allowed):
            torch.ops.leanattn.decode(**{**call, **change})


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
@pytest.mark.parametrize("value", [None, "e8m0"])
def test_what_is_no_tensor_of_a_known_dtype(name, value, device):
    """torch hands on None for a tensor, and dtypes that its stable ABI has no word for."""
    call = good_call(device)
    other = None if value is None else call[name].to(torch.float8_e8m0fnu)
    with pytest.raises(RuntimeError, match=f"decode: {name} (must be a tensor|has a dtype)"):
        torch.ops.leanattn.decode(**{**call, name: other})


def test_a_softcap_that_fp32_takes_for_none(device):
    with pytest.raises(RuntimeError, match="softcap must be .* got 1e-300"):
        torch.ops.leanattn.decode(**good_call(device, softcap=1e-300))


NOT_SUPPORTED = {
    "head-dim-1024": ("q|k_cache", replace(q=(2, 3, 4, 1024), k_cache=(2, 50, 2, 1024))),
    "value-head-dim-576": ("v_cache", replace(v_cache=(2, 50, 2, 576))),
}


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_not_supported(name, device):
    """What others may have and the op does not says so."""
    argument, change = NOT_SUPPORTED[name]
    call = good_call(device)
    with pytest.raises((RuntimeError, ValueError), match="not supported") as raised:
        torch.ops.leanattn.decode(**{**call, **change(call, device)})
    assert_names(str(raised.value), "decode", (argument,), ())


def out_call(device):
    call = good_call(device)
    call["out"] = torch.empty(2, 3, 4, 32, dtype=call["q"].dtype, device=device)
    call["lse"] = torch.empty(2, 3, 4, device=device)
    return call


@pytest.mark.parametrize(
    "argument, shape, other_dtype, values",
    [
        ("out", (2, 3, 4, 64), None, (64, 32)),
        ("out", (2, 3, 5, 32), None, (5, 4)),
        ("out", (3, 3, 4, 32), None, (3, 2)),
        ("out", (2, 4, 32), None, ()),
        ("out", (2, 3, 4, 32), torch.bfloat16, (torch.bfloat16,)),
        ("out", (2, 3, 4, 32), torch.float64, (torch.float64,)),
        ("lse", (2, 4, 3), None, (3, 4)),
        ("lse", (2, 3), None, ()),
        ("lse", (2, 3, 4, 1), None, ()),
        ("lse", (2, 3, 4), torch.float16, (torch.float16,)),
        ("lse", (2, 3, 4), torch.float64, (torch.float64,)),
    ],
)
def test_out_and_lse(argument, shape, other_dtype, values, device):
    """Nothing is resized, cast or written in part."""
    call = out_call(device)
    dtype = other_dtype or call[argument].dtype
    call[argument] = torch.empty(shape, dtype=dtype, device=device)
    assert_refused(call, (argument,), values, "decode_with_lse_out")


def test_out_that_overlaps_itself(device):
    """Stride 0 is for what is read: written, its rows would overwrite each other."""
    call = out_call(device)
    call["out"] = call["out"][:1].expand(2, 3, 4, 32)
    assert_refused(call, ("out",), (), "decode_with_lse_out")


def every_other_column(x):
    """The same shape with a last stride of 2."""
    return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]


@pytest.mark.gpu
@pytest.mark.parametrize("argument", ["q", "k_cache", "v_cache", "out"])
def test_last_stride(argument, device):
    """Copies of 16 bytes need a contiguous last dimension; stride 2 and stride 0 are not."""
    for strided in (every_other_column, lambda x: x[..., :1].expand(x.shape)):
        call = out_call(device)
        call[argument] = strided(call[argument])
        stride = call[argument].stride(-1)
        assert_refused(call, (argument,), (stride,), "decode_with_lse_out")


def misaligned_pointer(x):
    """The same strides, two bytes further on."""
    memory = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    return memory[1:].view(x.shape)


def misaligned_rows(x):
    """An aligned pointer, rows of D + 1 numbers."""
    memory = torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    return memory[..., : x.shape[-1]]


@pytest.mark.gpu
@pytest.mark.parametrize("argument", ["q", "k_cache", "v_cache", "out"])
@pytest.mark.parametrize("misaligned", [misaligned_pointer, misaligned_rows])
def test_alignment(misaligned, argument, device):
    """Copies need pointers and strides that are multiples of what they copy at a time."""
    call = out_call(device)
    call[argument] = misaligned(call[argument])
    grain = 4 if "cache" in argument else 16
    assert_refused(call, (argument,), (grain,), "decode_with_lse_out")


@pytest.mark.gpu
def test_fp32_on_cuda(device):
    """fp32 is for the CPU."""
    call = good_call(device)
    for name in ("q", "k_cache", "v_cache"):
        call[name] = call[name].float()
    assert_refused(call, ("q",), (torch.float32,))


TENSORS = [
    "q", "k_cache", "v_cache", "cache_seqlens", "cu_seqlens_q", "alibi_slopes", "sinks", "counters",
    "out", "lse",
]  # fmt: skip


def call_with_every_tensor(device):
    call = ragged_call(device, sinks=True, alibi="batch")
    call["counters"] = leanattn.counters(torch.device(device), 256)
    call["out"] = torch.empty(5, 4, 32, dtype=call["q"].dtype, device=device)
    call["lse"] = torch.empty(5, 4, device=device)
    return call


def test_a_call_with_every_tensor_is_good(device):
    """The calls below differ from this one in one device only."""
    torch.ops.leanattn.decode_with_lse_out(**call_with_every_tensor(device))


@pytest.mark.parametrize("argument", TENSORS)
def test_meta_tensor_among_real_ones(argument, device):
    """A meta tensor has no memory: neither a null pointer read nor a result never written."""
    call = call_with_every_tensor(device)
    call[argument] = call[argument].to("meta")
    others = {"q": ("q", "k_cache")}.get(argument, (argument, "q"))
    assert_refused(call, others, ("meta",), "decode_with_lse_out")


@pytest.mark.gpu
@pytest.mark.not_emulated
@pytest.mark.parametrize("argument", TENSORS)
def test_cpu_tensor_among_cuda_ones(argument, device):
    """A host pointer in a kernel is a fault that kills the process's CUDA context."""
    call = call_with_every_tensor(device)
    call[argument] = call[argument].cpu()
    others = {"q": ("q", "k_cache")}.get(argument, (argument,))
    assert_refused(call, others, ("cpu",), "decode_with_lse_out")


@pytest.mark.gpu
@pytest.mark.parametrize("argument", TENSORS)
def test_cuda_tensor_among_cpu_ones(argument, device):
    """One tensor on CUDA sends the call to the CUDA implementation: it must refuse the others."""
    call = call_with_every_tensor("cpu")
    call[argument] = call[argument].to(device)
    with pytest.raises((RuntimeError, ValueError), match="cuda|cpu"):
        torch.ops.leanattn.decode_with_lse_out(**call)


@pytest.mark.gpu
@pytest.mark.parametrize("argument", TENSORS)
def test_tensor_of_another_gpu(argument, device):
    """Two GPUs in one call, where peer access could even hide it."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call = call_with_every_tensor("cuda:0")
    call[argument] = call[argument].to("cuda:1")
    others = {"q": ("q", "k_cache")}.get(argument, (argument,))
    assert_refused(call, others, (), "decode_with_lse_out")


def test_refusal_writes_nothing(device):
    """The check comes before the first store."""
    call = out_call(device)
    call["out"].fill_(7.0)
    call["lse"].fill_(7.0)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.leanattn.decode_with_lse_out(**call, softcap=-1.0)
    assert (call["out"] == 7.0).all() and (call["lse"] == 7.0).all()


@pytest.mark.parametrize("length", [-1, 51, -(2**31), 2**31 - 1])
def test_check_mode_refuses_lengths_that_would_be_clamped(length, device, monkeypatch):
    """LEANATTN_CHECK=1 finds the caller's bug instead of hiding it."""
    call = good_call(device)
    call["cache_seqlens"] = int32([50, length], device)
    torch.ops.leanattn.decode(**call)
    monkeypatch.setenv("LEANATTN_CHECK", "1")
    assert_refused(call, ("cache_seqlens",), (length, 50))


@pytest.mark.parametrize("entries", [(0, 3, 6), (0, 4, 3), (-1, 3, 5), (0, -(2**31), 5)])
def test_check_mode_refuses_offsets_that_would_be_clamped(entries, device, monkeypatch):
    """Beyond total_q, going back, negative."""
    call = ragged_call(device)
    call["cu_seqlens_q"] = int32(entries, device)
    torch.ops.leanattn.decode(**call)
    monkeypatch.setenv("LEANATTN_CHECK", "1")
    assert_refused(call, ("cu_seqlens_q",), ())


def test_check_mode_takes_what_is_right(device, monkeypatch):
    """0 and S are lengths, an empty query range is a range; LEANATTN_CHECK=0 is off."""
    monkeypatch.setenv("LEANATTN_CHECK", "1")
    call = ragged_call(device)
    call["cache_seqlens"] = int32([0, 50], device)
    torch.ops.leanattn.decode(**call)
    torch.ops.leanattn.decode(**{**call, "cu_seqlens_q": offsets([0, 5], device)})
    monkeypatch.setenv("LEANATTN_CHECK", "0")
    torch.ops.leanattn.decode(**{**call, "cache_seqlens": int32([-1, 51], device)})


@pytest.mark.parametrize("text", ["0", "-1", "65537", "3x", " 3", "many"])
def test_wrong_number_of_units(text, device, force_units):
    force_units(text)
    assert_refused(good_call(device), ("LEANATTN_NUM_UNITS",), (65536, f"'{text}'"))


@pytest.mark.parametrize("layout", ["teams:1", "clusters:2", "whole"])
def test_forced_units_and_another_layout(layout, device, force_units, monkeypatch):
    """Units are forced for stream-K: what asks for both is refused, not half ignored."""
    force_units(3)
    monkeypatch.setenv("LEANATTN_LAYOUT", "stream_k")
    torch.ops.leanattn.decode(**good_call(device))
    monkeypatch.setenv("LEANATTN_LAYOUT", layout)
    for other in ("LEANATTN_LAYOUT", "LEANATTN_NUM_UNITS"):
        assert_refused(good_call(device), (other,), (f"'{layout}'",))


def test_torch_itself_refuses_what_is_no_tensor(device):
    """Lists and missing arguments never reach the op."""
    call = good_call(device)
    with pytest.raises((TypeError, RuntimeError)):
        torch.ops.leanattn.decode(**{**call, "cache_seqlens": [50, 20]})
    with pytest.raises((TypeError, RuntimeError)):
        torch.ops.leanattn.decode(call["q"], call["k_cache"])
