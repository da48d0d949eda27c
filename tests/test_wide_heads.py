"""Head dims beyond 256, and multi-head latent attention: the values are the keys' first columns."""

import math

import pytest
import torch
from cases import check, int32, make_case, poison_unseen, run
from paging import paginate
from reference import assert_close, assert_same_bits

import leanattn

pytestmark = pytest.mark.usefixtures("loader")

LATENT = dict(dims=(576, 512), values_in_keys=True)
DIMS = [(264, 264), (256, 264), (264, 8), (320, 504), (512, 512), (576, 512), (576, 128)]


@pytest.mark.parametrize("units", [1, 3, 64])
@pytest.mark.parametrize("dims", DIMS)
def test_head_dims(dims, units, device, dtype, force_units):
    force_units(units)
    for heads in ((4, 2), (20, 1)):
        check(make_case(device, dtype, heads=heads, dims=dims, lengths=(300, 0, 65), seqlen_q=2))


@pytest.mark.parametrize("units", [1, 3, 64])
@pytest.mark.parametrize(
    "options",
    [
        dict(heads=(1, 1), lengths=(31, 32, 33, 1, 0)),
        dict(heads=(16, 1), lengths=(700, 90)),
        dict(heads=(64, 1), lengths=(300, 5)),
        dict(heads=(128, 1), lengths=(300, 40), seqlen_q=2),
        dict(heads=(16, 1), lengths=(300, 90), seqlen_q=5, window_left=64),
        dict(heads=(40, 1), lengths=(300, 90, 9), query_lengths=(3, 0, 4)),
        dict(heads=(8, 2), lengths=(300, 40), alibi="batch", softcap=4.0, sinks=True),
    ],
    ids=lambda options: "-".join(options),
)
def test_latent(options, units, device, dtype, force_units):
    force_units(units)
    check(make_case(device, dtype, **LATENT, **options))


def test_latent_without_forced_units(device, dtype):
    """Whole items, and clusters where there are any."""
    for heads, batch, capacity in ((16, 1, 300), (16, 3, 200), (16, 150, 33), (128, 2, 100)):
        check(make_case(device, dtype, **LATENT, heads=(heads, 1), lengths=None, batch=batch,
                        capacity=capacity))  # fmt: skip


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_view_has_the_bits_of_a_copy(batch_invariant, heads, device, dtype, force_units):
    """Of values in the keys: one copy from memory, or two, cut alike. By itself the layout counts
    the bytes to be read, and may cut the two differently."""
    if not batch_invariant:
        force_units(7)
    case = make_case(device, dtype, **LATENT, heads=(heads, 1), lengths=(300, 90), seqlen_q=2)
    expected = run(case, batch_invariant=batch_invariant)
    case["v_cache"] = case["v_cache"].contiguous()
    for a, b in zip(run(case, batch_invariant=batch_invariant), expected):
        assert_same_bits(a, b)


@pytest.mark.parametrize("shift", [8, 64])
def test_values_elsewhere_in_the_keys(shift, device, dtype):
    """A view that begins after the first column is no part of the keys' stage."""
    case = make_case(device, dtype, dims=(576, 512), heads=(16, 1), lengths=(300, 90))
    case["v_cache"] = case["k_cache"][..., shift : shift + 512]
    check(case)


def test_values_of_other_tokens_of_the_keys(device, dtype):
    """The same memory from the same place on, with other strides."""
    case = make_case(device, dtype, dims=(512, 512), heads=(16, 1), lengths=(100, 90), batch=2)
    memory = case["k_cache"].nan_to_num(1.0)
    case["k_cache"] = memory[:, 0:100]
    case["v_cache"] = memory.as_strided(case["k_cache"].shape, (*memory.stride()[:1], 0, 512, 1))
    check(case)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 100])
def test_latent_pages(page_size, heads, device, dtype):
    case = make_case(device, dtype, **LATENT, heads=(heads, 1), lengths=(300, 5, 0, 130))
    assert_close(*run(paginate(case, page_size, layout="values-in-keys")), **case)


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_no_row_sees_changes_no_bit(poison, heads, device, dtype):
    case = make_case(device, dtype, **LATENT, heads=(heads, 1), lengths=(300, 5, 33), seqlen_q=3,
                     window_left=100, poison=0.0)  # fmt: skip
    out, lse = check(case)
    poison_unseen(case, poison)
    poisoned_out, poisoned_lse = run(case)
    assert_same_bits(poisoned_out, out)
    assert_same_bits(poisoned_lse, lse)


@pytest.mark.parametrize("heads", [4, 40])
def test_nan_shows_only_where_it_is_seen(heads, device, dtype):
    """In keys that some queries of an item see and others do not."""
    for key in (299, 298, 198, 150):
        case = make_case(device, dtype, dims=(576, 512), heads=(heads, 1), lengths=(300, 90),
                         seqlen_q=3, window_left=100)  # fmt: skip
        case["v_cache"][0, key, 0, key] = math.nan
        case["v_cache"][0, key, 0, 3] = math.inf
        check(case)


@pytest.mark.parametrize("heads", [16, 40])
def test_batch_invariant(heads, device, dtype, force_units):
    case = make_case(device, dtype, **LATENT, heads=(heads, 1), lengths=(900, 133, 32))
    expected = None
    for units in (1, 5, 64):
        force_units(units)
        result = run(case, batch_invariant=True)
        assert_close(*result, **case)
        expected = expected or result
        for a, b in zip(result, expected):
            assert_same_bits(a, b)
    for page_size in (1, 24, 64):
        paged = paginate(case, page_size, layout="values-in-keys")
        for a, b in zip(run(paged, batch_invariant=True), expected):
            assert_same_bits(a, b)


@pytest.mark.parametrize("q_dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("cache", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_float8(cache, q_dtype, device):
    for heads in (16, 40):
        case = make_case(device, q_dtype, **LATENT, heads=(heads, 1), lengths=(300, 5, 0, 130),
                         cache_dtype=cache, scales="one")  # fmt: skip
        check(case)
        assert_close(*run(paginate(case, 16, layout="values-in-keys")), **case)
    check(make_case(device, q_dtype, dims=(512, 272), lengths=(300, 40), cache_dtype=cache))


def test_what_append_kv_wrote(device, dtype):
    """A latent cache is filled as any other, its values being a view that is written twice."""
    cache = torch.zeros(2, 100, 1, 576, dtype=dtype, device=device)
    new = torch.randn(2, 70, 1, 576, device=device).to(dtype)
    lengths = int32([0, 30], device)
    values = cache[..., :512]
    leanattn.append_kv(new, new[..., :512], cache, values, lengths)
    q = torch.randn(2, 1, 16, 576, device=device).to(dtype)
    case = dict(q=q, k_cache=cache, v_cache=values, cache_seqlens=lengths + 70)
    check(case)
    assert torch.equal(cache[0, :70], new[0]) and torch.equal(cache[1, 30:], new[1])


def test_compiled(device, dtype):
    """Two inputs that are views of one memory."""

    @torch.compile(fullgraph=True)
    def attend(q, cache, lengths):
        return torch.ops.leanattn.decode(q, cache, cache[..., :512], lengths) * 2

    case = make_case(device, dtype, **LATENT, heads=(16, 1), lengths=(300, 90))
    out = attend(case["q"], case["k_cache"], case["cache_seqlens"])
    assert_same_bits(out, run(case)[0] * 2)
