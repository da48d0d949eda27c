"""Strides: any layout whose last dimension is contiguous gives the result of the contiguous one.

Whatever memory lies around a view is NaN, so a row read from outside shows.
"""

import math

import pytest
import torch
from cases import int32, make_case, run, sharp_dtype
from reference import assert_close, assert_same_bits

pytestmark = pytest.mark.usefixtures("loader")


def surrounded(x, *shape):
    """NaN memory of the given shape, of x's dtype and device."""
    return torch.full(shape, math.nan, dtype=x.dtype, device=x.device)


def fill(view, x):
    view.copy_(x)
    return view


def heads_first(x):
    """A [B, H, S, D] cache seen as [B, S, H, D]."""
    b, s, h, d = x.shape
    return fill(surrounded(x, b, h, s, d).transpose(1, 2), x)


def tokens_first(x):
    """A [S, B, H, D] cache seen as [B, S, H, D]."""
    b, s, h, d = x.shape
    return fill(surrounded(x, s, b, h, d).transpose(0, 1), x)


def batch_slice(x):
    """Sequences from the middle of a larger cache."""
    b, s, h, d = x.shape
    return fill(surrounded(x, b + 3, s, h, d)[2 : 2 + b], x)


def every_other_sequence(x):
    b, s, h, d = x.shape
    return fill(surrounded(x, 2 * b, s, h, d)[1::2], x)


def token_slice(x):
    """Tokens from the middle of a longer cache."""
    b, s, h, d = x.shape
    return fill(surrounded(x, b, s + 24, h, d)[:, 8 : 8 + s], x)


def every_third_token(x):
    b, s, h, d = x.shape
    return fill(surrounded(x, b, 3 * s, h, d)[:, 1::3], x)


def head_slice(x):
    """The KV heads of one rank of many."""
    b, s, h, d = x.shape
    return fill(surrounded(x, b, s, h + 3, d)[:, :, 1 : 1 + h], x)


def column_slice(x):
    """The middle columns of a wider row."""
    b, s, h, d = x.shape
    return fill(surrounded(x, b, s, h, d + 24)[..., 8 : 8 + d], x)


CACHE_LAYOUTS = [
    heads_first, tokens_first, batch_slice, every_other_sequence, token_slice, every_third_token,
    head_slice, column_slice,
]  # fmt: skip


def assert_same_result(case, changed):
    """`changed` holds the numbers of `case` in other strides: the truth is that of `case`."""
    out, lse = run(changed)
    assert_close(out, lse, **case)


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_cache_layout(layout, device, dtype):
    """K in the layout, V in the layout, both: each has strides of its own."""
    case = make_case(device, dtype, lengths=(5, 200, 129), capacity=200, dims=(64, 72))
    k, v = layout(case["k_cache"]), layout(case["v_cache"])
    assert_same_result(case, {**case, "k_cache": k})
    assert_same_result(case, {**case, "v_cache": v})
    assert_same_result(case, {**case, "k_cache": k, "v_cache": v})


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (72, 40), (256, 256)])
def test_k_and_v_packed_in_one_row(dims, device, dtype):
    """[B, S, Hkv, D + Dv]: a copy of a whole row of K would bring V along."""
    case = make_case(device, dtype, lengths=(5, 200, 129), capacity=200, dims=dims)
    packed = torch.cat([case["k_cache"], case["v_cache"]], dim=-1)
    k, v = packed[..., : dims[0]], packed[..., dims[0] :]
    assert_same_result(case, {**case, "k_cache": k, "v_cache": v})


def test_k_and_v_packed_beside_each_other(device, dtype):
    """[B, S, 2, Hkv, D] and [2, B, S, Hkv, D]."""
    case = make_case(device, dtype, lengths=(5, 200, 129), capacity=200)
    for dim in (2, 0):
        packed = torch.stack([case["k_cache"], case["v_cache"]], dim=dim)
        k, v = packed.unbind(dim)
        assert_same_result(case, {**case, "k_cache": k, "v_cache": v})


@pytest.mark.parametrize("rows", ["4d", "3d", "ragged"])
def test_q_as_a_slice_of_packed_qkv(rows, device, dtype):
    """q of one projection that made q, k and v: its row stride is not Hq * D."""
    options = {"4d": dict(seqlen_q=3), "3d": dict(seqlen_q=None),
               "ragged": dict(query_lengths=(3, 0, 4))}[rows]  # fmt: skip
    case = make_case(device, dtype, heads=(6, 2), **options)
    q = case["q"]
    packed = surrounded(q, *q.shape[:-2], 6 + 2 + 2, q.shape[-1])
    assert_same_result(case, {**case, "q": fill(packed[..., :6, :], q)})


def test_q_with_heads_before_rows(device, dtype):
    """[B, Hq, Sq, D] as scaled_dot_product_attention wants it, seen as [B, Sq, Hq, D]."""
    case = make_case(device, dtype, seqlen_q=3)
    assert_same_result(case, {**case, "q": heads_first(case["q"])})


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_stride_zero_in_the_caches(dim, device, dtype):
    """A shared prefix, one token repeated, one KV head for all: expanded, not copied."""
    case = make_case(device, dtype, lengths=None, batch=3, capacity=140, heads=(6, 3), poison=None)
    expanded = {
        name: case[name].narrow(dim, 0, 1).expand(case[name].shape)
        for name in ("k_cache", "v_cache")
    }
    copied = {name: tensor.contiguous() for name, tensor in expanded.items()}
    lengths = int32([140, 3, 129], device)
    assert_same_result(
        {**case, **copied, "cache_seqlens": lengths}, {**case, **expanded, "cache_seqlens": lengths}
    )


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_stride_zero_in_q(dim, device, dtype):
    """One query for all sequences, rows or heads."""
    case = make_case(device, dtype, seqlen_q=3)
    expanded = case["q"].narrow(dim, 0, 1).expand(case["q"].shape)
    assert_same_result({**case, "q": expanded.contiguous()}, {**case, "q": expanded})


@pytest.mark.parametrize("stride", [1, 3, 2**31 + 1, 2**50])
def test_strides_of_size_one_dimensions_mean_nothing(stride, device, dtype):
    """torch leaves anything there; a tensor map or an alignment check must not look at it."""
    case = make_case(device, dtype, heads=(1, 1), lengths=(140,), capacity=150)

    def absurd(x):
        strides = [stride if size == 1 else old for size, old in zip(x.shape, x.stride())]
        return x.as_strided(x.shape, strides)

    changed = {name: absurd(case[name]) for name in ("q", "k_cache", "v_cache")}
    assert_same_result(case, {**case, **changed})
    out = torch.zeros_like(case["q"])
    torch.ops.leanattn.decode_out(**case, out=absurd(out))
    assert_same_bits(out, run(case)[0])


@pytest.mark.parametrize("stride", [3, 2**31 + 1])
def test_strides_of_a_one_token_cache_mean_nothing(stride, device, dtype):
    """S = 1: the token stride is one of them."""
    case = make_case(device, dtype, heads=(2, 2), lengths=(1, 1), capacity=1)
    changed = {
        name: case[name].as_strided(case[name].shape, (128, stride, 64, 1))
        for name in ("k_cache", "v_cache")
    }
    assert_same_result(case, {**case, **changed})


def odd_rows(x):
    """An odd pointer and rows of an odd number of columns."""
    return fill(surrounded(x, *x.shape[:-1], x.shape[-1] + 3)[..., 1:-2], x)


def every_other_column(x):
    return fill(surrounded(x, *x.shape, 2)[..., 1], x)


@pytest.mark.parametrize("odd", [odd_rows, every_other_column])
def test_the_cpu_takes_any_strides(odd):
    """Alignments and last strides that CUDA refuses (test_errors.py)."""
    case = make_case("cpu", torch.float32, dims=(24, 40), seqlen_q=3)
    changed = {name: odd(case[name]) for name in ("q", "k_cache", "v_cache")}
    assert_same_result(case, {**case, **changed})
    expected, _ = run(case)
    out = odd(expected)
    torch.ops.leanattn.decode_out(**case, out=out.fill_(0))
    assert_same_bits(out, expected)


def column_of_three(x):
    """Every third number of memory whose other numbers would be wrong ones."""
    wide = torch.full((*x.shape, 3), 99, dtype=x.dtype, device=x.device)
    return fill(wide[..., 1], x)


def columns_first(x):
    """A matrix whose columns, not its rows, are one behind the other."""
    return x.mT.contiguous().mT


@pytest.mark.parametrize(
    "name, strided",
    [
        ("cache_seqlens", column_of_three),
        ("cu_seqlens_q", column_of_three),
        ("sinks", column_of_three),
        ("alibi_slopes", column_of_three),
        ("alibi_slopes", columns_first),
    ],
)
def test_small_tensors_of_any_strides(name, strided, device):
    """Read by their strides: the bits are those of the contiguous ones."""
    case = make_case(
        device, sharp_dtype(device), query_lengths=(2, 1, 4), sinks=True, alibi="batch"
    )
    expected, expected_lse = run(case)
    assert_close(expected, expected_lse, **case)
    out, lse = run({**case, name: strided(case[name])})
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)


@pytest.mark.parametrize("name", ["cache_seqlens", "sinks", "alibi_slopes"])
def test_stride_zero_in_small_tensors(name, device):
    """One length for all sequences, one sink for all heads, one row of slopes."""
    case = make_case(
        device, sharp_dtype(device), lengths=(77, 77, 77), seqlen_q=2, sinks=True, alibi="batch"
    )
    expanded = case[name][:1].expand_as(case[name])
    assert_same_result({**case, name: expanded.contiguous()}, {**case, name: expanded})


def test_layouts_under_forced_units(device, force_units):
    """A unit that starts in the middle of a head computes its first address from the strides."""
    case = make_case(device, sharp_dtype(device), lengths=(700, 129, 300), capacity=700)
    for layout in (heads_first, every_third_token, head_slice):
        changed = {**case, "k_cache": layout(case["k_cache"]), "v_cache": layout(case["v_cache"])}
        for units in (1, 5, 64):
            force_units(units)
            assert_same_result(case, changed)
