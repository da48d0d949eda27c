"""append_decode is append and then decode: the same bits, the same caches, whatever the call is."""

import itertools

import pytest
import torch
from append_cases import BAD_LENGTHS, FP8, INT32_MAX, INT32_MIN, OPS
from append_decode_cases import check, cloned, make_step, same_numbers
from cases import int32, launched, sharp_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import leanattn

STEPS = {
    "one-token": dict(seqlen_new=1),
    "one-token-3d": dict(seqlen_new=None),
    "three-tokens": dict(seqlen_new=3),
    "ragged": dict(new_lengths=(3, 0, 4)),
    "ragged-many": dict(batch=70, new_lengths=[i % 3 for i in range(70)],
                        lengths=[i % 20 for i in range(70)]),
    "no-token-last": dict(new_lengths=(1, 1, 0)),
    "value-dim": dict(dims=(64, 32)),
    "one-head": dict(heads=(1, 1)),
    "many-heads": dict(heads=(48, 4), dims=(128, 128), seqlen_new=1),
    "head-dim-40": dict(dims=(40, 40), seqlen_new=1),
    "head-dim-80": dict(dims=(80, 104), seqlen_new=1),
    "head-dim-256": dict(dims=(256, 256), seqlen_new=1),
    "full": dict(lengths=(23, 24, 22), seqlen_new=3),
    "full-one-token": dict(lengths=(23, 24, 22), seqlen_new=1),
    "long": dict(batch=1, lengths=(120,), seqlen_new=70, capacity=188),
    "tile-border": dict(lengths=(127, 128, 126), seqlen_new=1, capacity=400),
    "over-a-tile-border": dict(lengths=(126, 255, 254), seqlen_new=4, capacity=400),
    "long-cache": dict(lengths=(700, 1000, 0), seqlen_new=1, capacity=1024, dims=(128, 128)),
}  # fmt: skip
PAGINGS = {"contiguous": {}, "pages-of-3": dict(page_size=3), "pages-of-8": dict(page_size=8),
           "pages-of-16": dict(page_size=16)}  # fmt: skip
ROPES = {"no-rope": dict(rope=False), "neox": {}, "gptj": dict(interleaved=True)}


COMBINATIONS = [*itertools.product(PAGINGS, ["neox"])]
COMBINATIONS += itertools.product(["contiguous", "pages-of-8"], ["no-rope", "gptj"])


@pytest.mark.parametrize("paging, rope", COMBINATIONS)
@pytest.mark.parametrize("name", STEPS)
def test_named_step(name, paging, rope, device):
    step = make_step(device, torch.float16, **STEPS[name], **PAGINGS[paging], **ROPES[rope])
    out = check(step)
    assert out.isfinite().all()


@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
def test_dtypes(packed, dtype, device):
    for table_dtype, seqlen_new in itertools.product((torch.float32, dtype), (1, 3)):
        for paging in ({}, dict(page_size=8)):
            check(make_step(device, dtype, packed=packed, table_dtype=table_dtype,
                            seqlen_new=seqlen_new, **paging))  # fmt: skip


OPTIONS = {
    "window": dict(window_left=9),
    "softcap": dict(softcap=3.0),
    "not-causal": dict(causal=False),
    "scale": dict(softmax_scale=0.7),
    "batch-invariant": dict(batch_invariant=True),
}


@pytest.mark.parametrize("seqlen_new", [1, 4])
@pytest.mark.parametrize("paging", ["contiguous", "pages-of-8"])
@pytest.mark.parametrize("option", [*OPTIONS, "alibi", "sinks"])
def test_options(option, paging, seqlen_new, device):
    step = make_step(device, sharp_dtype(device), seqlen_new=seqlen_new, **PAGINGS[paging])
    options = dict(OPTIONS.get(option, {}))
    if option == "alibi":
        options["alibi_slopes"] = torch.rand(4, device=device)
    if option == "sinks":
        options["sinks"] = torch.randn(4, device=device)
    plain = OPS.append_decode(**cloned(step))
    out = check(step, **options)
    assert option in ("batch-invariant", "not-causal") or not same_numbers(out, plain)


@pytest.mark.parametrize("paging", ["contiguous", "pages-of-16"])
@pytest.mark.parametrize("window_left", [0, 100, 300, 999])
def test_a_window_over_long_caches(window_left, paging, device):
    """Whose first tiles nobody reads; with sinks, as models have both."""
    step = make_step(device, torch.float16, **STEPS["long-cache"], **PAGINGS[paging])
    check(step, window_left=window_left, sinks=torch.randn(step["q"].shape[-2], device=device))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("dims", [(20, 20), (100, 36), (64, 30)], ids=str)
def test_head_dims_in_pieces(dims, rope, device):
    """On CUDA q is padded for the decode, and rotated in what is padded."""
    for options in (dict(seqlen_new=1), dict(new_lengths=(3, 0, 4))):
        step = make_step(device, torch.float16, dims=dims, **options, **ROPES[rope])
        q = step["q"].clone()
        check(step)
        assert torch.equal(step["q"], q)


@pytest.mark.parametrize("cache_dtype", FP8)
@pytest.mark.parametrize("scale", [None, "one", "head", "batch"])
def test_float8_caches(scale, cache_dtype, device):
    for name, paging in itertools.product(("one-token", "three-tokens"), ({}, dict(page_size=8))):
        check(make_step(device, torch.bfloat16, cache_dtype=cache_dtype, scale=scale,
                        **STEPS[name], **paging))  # fmt: skip


@pytest.mark.parametrize("paging", ["contiguous", "pages-of-8"])
@pytest.mark.parametrize("seqlen_new", [1, 3])
def test_latent(seqlen_new, paging, device):
    check(make_step(device, torch.float16, rope=False, latent=True, heads=(16, 1),
                    dims=(576, 512), seqlen_new=seqlen_new, **PAGINGS[paging]))  # fmt: skip


@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("bad", BAD_LENGTHS)
def test_lengths_are_clamped(bad, page_size, device):
    for seqlen_new in (1, 3):
        step = make_step(device, sharp_dtype(device), page_size=page_size, seqlen_new=seqlen_new)
        step["cache_seqlens"] = int32(bad, device)
        # Whatever was NaN may be attended to now.
        check(step)


@pytest.mark.parametrize("page_size", [3, 8])
def test_a_page_that_there_is_not_is_skipped(page_size, device):
    """Such a row is not written, and what is attended to is what decode finds there."""
    for bad in (-1, INT32_MIN, INT32_MAX, 1000):
        step = make_step(device, sharp_dtype(device), page_size=page_size, seqlen_new=1)
        for name in ("k_cache", "v_cache"):
            step[name].nan_to_num_(0.5)
        step["block_table"][0, 5 // page_size] = bad
        check(step)


def test_offsets_are_clamped(device):
    for entries in ((0, 9, 4, 7), (-5, 2, 2, INT32_MAX), (3, 3, INT32_MIN, 5), (8, 0, 0, 0)):
        step = make_step(device, sharp_dtype(device), new_lengths=(3, 0, 4))
        step["cu_seqlens"] = int32(entries, device)
        step["k_cache"].nan_to_num_(0.5)
        step["v_cache"].nan_to_num_(0.5)
        check(step)


@pytest.mark.parametrize("page_size", [None, 8, 64])
def test_needle_at_the_new_token(page_size, device):
    """The new key alone matches the query, wherever the length puts it: its value comes back."""
    dim, capacity = 64, 300
    for length in (0, 1, 7, 8, 63, 64, 126, 127, 128, 129, 255, 256, 298, 299):
        step = make_step(
            device, sharp_dtype(device), batch=2, lengths=(length, 41), seqlen_new=1,
            capacity=capacity, page_size=page_size, max_position=capacity + 20,
        )  # fmt: skip
        step["k"].zero_()
        step["k"][..., 0] = 80
        step["q"].copy_(step["k"].repeat_interleave(2, 2))
        for name in ("k_cache", "v_cache"):
            step[name].nan_to_num_(0)
        step["k_cache"].mul_(0.01)
        out = OPS.append_decode(**step)
        wanted = step["v"].repeat_interleave(2, 2)
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
        assert dim == out.shape[-1]


def test_pages_that_sequences_share(device):
    """A prefix in the same pages; each sequence's new row goes to a page of its own."""
    step = make_step(device, sharp_dtype(device), lengths=(9, 10, 20), page_size=8, seqlen_new=1)
    for name in ("k_cache", "v_cache"):
        step[name].nan_to_num_(0.5)
    step["block_table"][:2, 0] = step["block_table"][2, 0]
    check(step)


def test_every_length_of_a_page(device):
    for length in range(0, 40):
        check(make_step(device, sharp_dtype(device), batch=2, lengths=(length, 39 - length),
                        capacity=40, page_size=8, seqlen_new=1))  # fmt: skip


def test_a_row_that_is_full(device):
    """Beyond the capacity nothing is written, and q is rotated as rope_append_kv does it."""
    step = make_step(device, sharp_dtype(device), lengths=(24, 23, 50), seqlen_new=1)
    before = step["k_cache"].clone()
    check(step)
    assert same_numbers(step["k_cache"][0], before[0])
    assert same_numbers(step["k_cache"][2], before[2])
    assert not same_numbers(step["k_cache"][1], before[1])


@pytest.mark.parametrize("shape", ["batch", "tokens", "ragged", "capacity", "pages"])
def test_zero_sizes(shape, device):
    options = {
        "batch": dict(batch=0, lengths=()), "tokens": dict(seqlen_new=0),
        "ragged": dict(new_lengths=(0, 0, 0)), "capacity": dict(capacity=0, lengths=(0, 0, 0)),
        "pages": dict(page_size=8, num_pages=0),
    }[shape]  # fmt: skip
    check(make_step(device, sharp_dtype(device), **options))


def test_strides(device):
    """q, k and v from one packed row, heads-first caches."""
    step = make_step(device, sharp_dtype(device), seqlen_new=1)
    packed = torch.cat([step["q"], step["k"], step["v"]], 2)
    step["q"], step["k"], step["v"] = packed.split([4, 2, 2], 2)
    for name in ("k_cache", "v_cache"):
        step[name] = step[name].transpose(1, 2).contiguous().transpose(1, 2)
    check(step)


def test_python_function(device):
    """Three ops, one computation."""
    step = make_step(device, sharp_dtype(device))
    out, lse = leanattn.append_decode(**cloned(step), return_lse=True)
    assert same_numbers(leanattn.append_decode(**cloned(step)), out)
    given = torch.full_like(out, 7)
    assert leanattn.append_decode(**cloned(step), out=given) is given
    assert same_numbers(given, out)
    assert lse.shape == out.shape[:-1] and lse.dtype == torch.float32
    with pytest.raises(ValueError, match="return_lse"):
        leanattn.append_decode(**step, out=given, return_lse=True)


@st.composite
def steps(draw):
    """Anything that both ops take, by the emulated GPU in seconds."""
    ragged = draw(st.booleans())
    batch = draw(st.integers(1, 4))
    capacity = draw(st.sampled_from([1, 17, 130, 300]))
    group, heads_kv = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    options = dict(
        batch=batch, capacity=capacity, heads=(group * heads_kv, heads_kv),
        dims=draw(st.sampled_from([(64, 64), (128, 128), (64, 128), (72, 40)])),
        lengths=draw(st.lists(st.integers(0, capacity + 2), min_size=batch, max_size=batch)),
        page_size=draw(st.sampled_from([None, 1, 8, 16, 64, 100])),
        rope=draw(st.booleans()), interleaved=draw(st.booleans()), packed=draw(st.booleans()),
        max_position=draw(st.sampled_from([1, 40, 400])),
    )  # fmt: skip
    if ragged:
        options["new_lengths"] = draw(
            st.lists(st.integers(0, 3), min_size=batch, max_size=batch).filter(any)
        )
    else:
        options["seqlen_new"] = draw(st.sampled_from([None, 1, 1, 2, 5]))
    some = dict(window_left=st.integers(0, 50), softcap=st.just(2.0), batch_invariant=st.just(True))
    decode = draw(st.fixed_dictionaries({}, optional=some))
    return options, decode


@settings(max_examples=40, deadline=None, derandomize=True, database=None,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(drawn=steps())
def test_random_steps(drawn, device):
    options, decode = drawn
    check(make_step(device, torch.float16, **options), **decode)


@pytest.mark.gpu
@pytest.mark.parametrize("units", [1, 3, 7])
def test_any_number_of_units(units, device, force_units):
    force_units(units)
    for name in ("long-cache", "over-a-tile-border", "ragged"):
        check(make_step(device, torch.float16, **STEPS[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["stream_k", "teams:1", "teams:2", "clusters:2", "clusters:3"])
def test_any_layout(layout, device, monkeypatch):
    monkeypatch.setenv("LEANATTN_LAYOUT", layout)
    for paging in ({}, dict(page_size=16)):
        check(make_step(device, torch.float16, **STEPS["long-cache"], **paging))


@pytest.mark.gpu
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("paging", ["contiguous", "pages-of-8", "pages-of-16"])
@pytest.mark.parametrize("name", ["one-token", "one-token-3d", "many-heads", "long-cache"])
def test_one_launch_where_it_can_be(name, paging, rope, device, monkeypatch):
    """On sm_90; and LEANATTN_LAUNCHES=2 makes the same of it."""
    monkeypatch.setenv("LEANATTN_HEAD_PAIRS", "0")
    options = {**STEPS[name], **PAGINGS[paging], **ROPES[rope]}
    step = make_step(device, torch.float16, **options)
    twin = cloned(step)
    count = 1 if torch.cuda.get_device_capability()[0] >= 9 else 2
    assert len(launched(lambda: OPS.append_decode(**step))) == count
    out = OPS.append_decode(**step)
    monkeypatch.setenv("LEANATTN_LAUNCHES", "2")
    assert len(launched(lambda: OPS.append_decode(**twin))) == 2
    assert same_numbers(out, OPS.append_decode(**twin))
    monkeypatch.setenv("LEANATTN_LAUNCHES", "both")
    with pytest.raises(RuntimeError, match="LEANATTN_LAUNCHES"):
        OPS.append_decode(**step)


@pytest.mark.gpu
def test_launches(device):
    """No more than two, and nothing beside them: no copy, no memset."""
    for name in STEPS:
        step = make_step(device, torch.float16, **STEPS[name])
        names = launched(lambda: OPS.append_decode(**step))
        assert len(names) <= 2, names
