"""Head dims that are no multiple of 8, whose rows lie on 8- or 4-byte steps: caches are read as
they lie, whatever stands behind a row."""

import pytest
import torch
from cases import check, make_case, run, sharp_dtype
from paging import paginate
from reference import assert_close, assert_same_bits

import leanattn

# Steps of 8 bytes, of 4, and beside whole rows; every kernel that there is for a head dim.
DIMS = [(100, 100), (20, 20), (50, 50), (100, 64), (64, 30), (4, 2), (180, 220), (260, 262)]
FLOAT8_DIMS = [(100, 100), (20, 20), (24, 64), (64, 4), (196, 132)]
CASES = {
    "one-query": dict(seqlen_q=1),
    "no-lengths": dict(lengths=None, batch=3, capacity=150),
    "several": dict(seqlen_q=3, window_left=70, alibi="heads"),
    "ragged-queries": dict(query_lengths=[2, 0, 5]),
    "many-rows": dict(seqlen_q=5, heads=(16, 2)),
    "values-in-keys": dict(values_in_keys=True),
}


def between_nan(x, room):
    """`x` in rows that are `room` columns longer, NaN in those."""
    wider = torch.full((*x.shape[:-1], x.shape[-1] + room), torch.nan, device=x.device)
    view = wider.to(x.dtype)[..., : x.shape[-1]]
    return view.copy_(x)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_fp64(name, dims, device, loader):
    check(make_case(device, sharp_dtype(device), dims=(max(dims), min(dims)), **CASES[name]))


@pytest.mark.parametrize("dims", DIMS[:3], ids=str)
def test_batch_invariant(dims, device):
    check(make_case(device, sharp_dtype(device), dims=dims), batch_invariant=True)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("room", [2, 4, 8])
def test_what_lies_behind_a_row(room, dims, device, loader):
    """It is another head's, and may be NaN; no row begins at a multiple of 16 bytes, or all do."""
    case = make_case(device, sharp_dtype(device), dims=dims, lengths=(140, 33))
    for name in ("q", "k_cache", "v_cache"):
        case[name] = between_nan(case[name], room)
    check(case)


@pytest.mark.parametrize("page_size", [1, 16, 24])
@pytest.mark.parametrize("dims", DIMS[:5], ids=str)
def test_pages(dims, page_size, device):
    case = make_case(device, sharp_dtype(device), dims=dims, lengths=(140, 0, 33))
    assert_close(*run(paginate(case, page_size)), **case)


@pytest.mark.parametrize("scales", [None, "batch"])
@pytest.mark.parametrize("dims", FLOAT8_DIMS, ids=str)
def test_float8(dims, scales, device):
    options = dict(dims=dims, lengths=(140, 33), cache_dtype=torch.float8_e4m3fn, scales=scales)
    check(make_case(device, torch.bfloat16, seqlen_q=2, poison=None, **options))


def test_given_out_and_lse(device):
    """Of any strides, as q."""
    dtype = sharp_dtype(device)
    case = make_case(device, dtype, dims=(20, 100), lengths=(40, 33))
    case["q"] = case["q"].transpose(1, 3).contiguous().transpose(1, 3)
    memory = torch.full((2, 1, 4, 107), 7.0, device=device).to(dtype)
    out, lse = memory[..., 3:103], torch.empty(2, 1, 4, device=device)
    torch.ops.leanattn.decode_with_lse_out(**case, out=out, lse=lse)
    assert_close(out, lse, **case)
    assert (memory[..., :3] == 7).all() and (memory[..., 103:] == 7).all()


def test_the_same_as_padded(device, dtype):
    """Columns of zeros behind q and the keys change no bit."""
    case = make_case(device, dtype, dims=(100, 100), lengths=(140, 33), poison=None)
    padded = {name: torch.nn.functional.pad(case[name], (0, 4)) for name in ("q", "k_cache")}
    padded["v_cache"] = torch.nn.functional.pad(case["v_cache"], (0, 4))
    out, lse = run(case)
    scale = dict(softmax_scale=100**-0.5)
    wide, wide_lse = run({**case, **padded}, **scale)
    assert_same_bits(out, wide[..., :100])
    assert_same_bits(lse, wide_lse)


@pytest.mark.parametrize("dims", [(1, 1), (33, 7), (575, 511)], ids=str)
def test_the_cpu_takes_any(dims):
    check(make_case("cpu", torch.float32, dims=dims, lengths=(140, 33), seqlen_q=2))


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype, dim, allowed", [(None, 33, 2), ("float8", 34, 4)])
def test_rows_of_no_whole_4_bytes_are_refused(cache_dtype, dim, allowed, device):
    case = make_case(device, torch.float16, dims=(dim, 64), poison=None,
                     cache_dtype=cache_dtype and torch.float8_e5m2)  # fmt: skip
    supported, reason = leanattn.is_supported(**case)
    assert not supported
    assert f"q has head dim {dim}; allowed are multiples of {allowed} from {allowed}" in reason


@pytest.mark.parametrize("dim", [100, 20, 50])
@pytest.mark.parametrize("step", ["append", "rope"])
def test_appended_and_attended_to(step, dim, device):
    """What is written is what is read."""
    dtype = sharp_dtype(device)
    case = make_case(device, dtype, dims=(dim, dim), lengths=(40, 33))
    k, v = torch.randn(2, 2, 1, 2, dim, device=device).to(dtype)
    lengths = case["cache_seqlens"] - 1
    where = (case["k_cache"], case["v_cache"], lengths)
    if step == "append":
        leanattn.append_kv(k, v, *where)
        assert_same_bits(case["k_cache"][0, 39], k[0, 0])
    else:
        angles = torch.rand(64, dim // 4, device=device)
        leanattn.rope_append_kv(case["q"], k, v, *where, None, angles.cos(), angles.sin())
    assert_same_bits(case["v_cache"][1, 32], v[1, 0])
    check(case)
