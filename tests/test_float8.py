"""float8 caches under fp16 and bf16 queries: both formats, with and without scales."""

import math

import pytest
import torch
from cases import check, int32, make_case, run
from paging import paginate
from reference import assert_close, assert_same_bits

import leanattn

pytestmark = pytest.mark.usefixtures("loader")

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=FORMATS)
def cache_dtype(request):
    return FORMATS[request.param]


@pytest.fixture(params=DTYPES)
def q_dtype(request):
    return DTYPES[request.param]


@pytest.mark.parametrize("units", [1, 3, 64])
@pytest.mark.parametrize(
    "options",
    [
        dict(lengths=(5, 200, 77, 0, 1300)),
        dict(lengths=(700, 300), heads=(6, 1), dims=(128, 128), scales="batch"),
        dict(lengths=(700, 300), heads=(2, 2), dims=(16, 240), scales="heads"),
        dict(lengths=(700, 300), heads=(71, 1), dims=(256, 144), scales="one"),
        dict(lengths=(400, 129), heads=(16, 2), seqlen_q=4, window_left=70, scales="batch"),
        dict(lengths=(400, 129, 9), query_lengths=(3, 0, 12), scales="batch"),
        dict(lengths=(300, 40), scales="batch", alibi="heads", softcap=4.0, sinks=True),
    ],
    ids=lambda options: "-".join(options),
)
def test_against_fp64(options, units, device, q_dtype, cache_dtype, force_units):
    force_units(units)
    check(make_case(device, q_dtype, cache_dtype=cache_dtype, **options))


def test_without_forced_units(device, q_dtype, cache_dtype):
    """Whole items, and clusters where there are any."""
    for options in (dict(batch=3), dict(batch=1), dict(batch=70, heads=(4, 4))):
        check(
            make_case(device, q_dtype, lengths=None, capacity=300, cache_dtype=cache_dtype,
                      scales="heads", **options)
        )  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
def test_pages(page_size, device, q_dtype, cache_dtype):
    case = make_case(device, q_dtype, lengths=(300, 5, 0, 450), cache_dtype=cache_dtype)
    assert_close(*run(paginate(case, page_size)), **case)


def test_every_number_of_the_format(device, q_dtype, cache_dtype):
    """One key that holds 256 numbers, whose values come out as they are; NaN and Inf too."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device).view(cache_dtype)
    q = torch.zeros(1, 1, 256, dtype=q_dtype, device=device)
    k_cache = torch.zeros(1, 1, 1, 256, device=device).to(cache_dtype)
    out = leanattn.decode(q, k_cache, numbers.view(1, 1, 1, 256))
    expected = numbers.to(q_dtype)
    assert (out.flatten().isnan() == expected.isnan()).all()
    assert_same_bits(out.flatten().nan_to_num(7.0) + 0.0, expected.nan_to_num(7.0) + 0.0)


def test_needles_in_every_dim(device, q_dtype, cache_dtype):
    """Each number of q meets its own number of k, and each of v comes out in its own place."""
    dim = 128
    for at in range(dim):
        q = torch.zeros(1, 1, dim, dtype=q_dtype, device=device)
        q[..., at] = 8.0
        k = torch.zeros(1, 300, 1, dim, device=device)
        v = torch.zeros(1, 300, 1, dim, device=device)
        k[0, 2 * at + 1, 0, at] = 32.0
        v[0, 2 * at + 1, 0, (at * 5) % dim] = 1.5
        out = leanattn.decode(q, k.to(cache_dtype), v.to(cache_dtype))
        expected = torch.zeros_like(out)
        expected[..., (at * 5) % dim] = 1.5
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("kind", ["one", "heads", "batch"])
def test_scales_of_any_strides(kind, device, cache_dtype):
    case = make_case(device, torch.float16, cache_dtype=cache_dtype, scales=kind)
    expected = check(case)
    for name in ("k_scale", "v_scale"):
        wide = torch.full((*case[name].shape, 3), 99.0, device=device)
        wide[..., 1] = case[name]
        case[name] = wide[..., 1]
    for mine, its in zip(run(case), expected):
        assert_same_bits(mine, its)


def test_one_scale_may_have_any_shape(device, cache_dtype):
    case = make_case(device, torch.float16, cache_dtype=cache_dtype, scales="one")
    expected, _ = check(case)
    for shape in ((1,), (1, 1)):
        more = {name: case[name].view(shape) for name in ("k_scale", "v_scale")}
        assert_same_bits(run({**case, **more})[0], expected)


def test_no_scale_is_a_scale_of_one(device, q_dtype, cache_dtype):
    case = make_case(device, q_dtype, cache_dtype=cache_dtype)
    ones = torch.ones(2, device=device)
    for mine, its in zip(run(case, k_scale=ones, v_scale=ones), check(case)):
        assert_same_bits(mine, its)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e9, 1e30])
def test_queries_beyond_fp16(size, device):
    """bf16 reaches further than fp16."""
    case = make_case(device, torch.bfloat16, heads=(6, 2), cache_dtype=torch.float8_e4m3fn)
    case["q"] *= size * torch.logspace(-3, 0, 6, device=device)[:, None]
    if size > 1:
        case["k_scale"] = torch.tensor(1 / size, device=device)
    check(case)


@pytest.mark.parametrize("where", ["q", "k_cache", "v_cache"])
@pytest.mark.parametrize("units", [1, 3])
def test_nan_shows_only_where_it_is_seen(units, where, device, q_dtype, cache_dtype, force_units):
    force_units(units)
    case = make_case(device, q_dtype, lengths=(300, 5), seqlen_q=6, heads=(6, 2), poison=0.0)
    if where == "q":
        case["q"][0, 2, 4, 7] = math.nan
    else:
        case[where][0, 297, 1, 9] = math.nan
    case.update({name: case[name].to(cache_dtype) for name in ("k_cache", "v_cache")})
    check(case)


def test_rows_on_8_byte_boundaries(device, q_dtype, cache_dtype):
    """Which CUDA takes for float8."""
    case = make_case(device, q_dtype, lengths=(300, 129), cache_dtype=cache_dtype)
    expected = check(case)
    for name in ("k_cache", "v_cache"):
        cache = case[name]
        wide = torch.zeros(*cache.shape[:3], cache.shape[3] + 24, dtype=torch.uint8, device=device)
        wide[..., 8:-16] = cache.view(torch.uint8)
        case[name] = wide[..., 8:-16].view(cache.dtype)
    for mine, its in zip(run(case), expected):
        assert_same_bits(mine, its)


def test_what_append_kv_wrote(device, q_dtype, cache_dtype):
    """Quantised with the scales that decode takes them back by."""
    batch, tokens, heads, dim = 2, 150, 2, 64
    k, v = (torch.randn(batch, tokens, heads, dim, device=device).to(q_dtype) for _ in range(2))
    caches = [torch.zeros(batch, 200, heads, dim, device=device).to(cache_dtype) for _ in range(2)]
    scales = dict(k_scale=torch.tensor([[0.02, 3.0], [0.5, 1.0]], device=device),
                  v_scale=torch.tensor([0.1, 0.7], device=device))  # fmt: skip
    leanattn.append_kv(k, v, *caches, int32([0, 0], device), **scales)
    q = torch.randn(batch, 6, dim, device=device).to(q_dtype)
    case = dict(q=q, k_cache=caches[0], v_cache=caches[1], cache_seqlens=int32([150, 150], device))
    out, _ = check({**case, **scales})
    exact = leanattn.decode(q, k, v)
    step = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}[cache_dtype]
    assert (out.float() - exact.float()).abs().max() < 4 * step


def test_batch_invariant(device, q_dtype, cache_dtype, monkeypatch):
    """The bits of a sequence alone, in a batch, and on pages."""
    case = make_case(
        device, q_dtype, lengths=(900, 133, 1024), heads=(6, 2), cache_dtype=cache_dtype,
        scales="batch", poison=None,
    )  # fmt: skip
    invariant = dict(batch_invariant=True)
    out, lse = run(case, **invariant)
    assert_close(out, lse, **case)
    paged_out, _ = run(paginate(case, 24), **invariant)
    assert_same_bits(paged_out, out)
    for sequence in range(3):
        alone = {name: tensor[sequence : sequence + 1] for name, tensor in case.items()}
        for units in (1, 7):
            monkeypatch.setenv("LEANATTN_NUM_UNITS", str(units))
            alone_out, alone_lse = run(alone, **invariant)
            assert_same_bits(alone_out, out[sequence : sequence + 1])
            assert_same_bits(alone_lse, lse[sequence : sequence + 1])


def test_same_bits_in_every_run(device, q_dtype, cache_dtype):
    case = make_case(device, q_dtype, lengths=(900, 5, 300), cache_dtype=cache_dtype)
    expected, _ = check(case)
    for _ in range(5):
        assert_same_bits(run(case)[0], expected)


@pytest.mark.filterwarnings("ignore")
def test_compile(device, cache_dtype):
    case = make_case(device, torch.bfloat16, cache_dtype=cache_dtype, scales="heads")
    compiled = torch.compile(lambda **more: leanattn.decode(**more), fullgraph=True)
    assert_same_bits(compiled(**case), leanattn.decode(**case))


def is_refused(case, *words, **more):
    supported, reason = leanattn.is_supported(**{**case, **more})
    assert not supported
    assert all(word in reason for word in words), reason


def test_mistakes(device, cache_dtype):
    """Each is named, with what is allowed."""
    case = make_case(device, torch.float16, cache_dtype=cache_dtype)
    assert leanattn.is_supported(**case)[0]
    other = FORMATS["e4m3" if cache_dtype == FORMATS["e5m2"] else "e5m2"]
    is_refused(case, "v_cache", "k_cache's dtype", v_cache=case["v_cache"].to(other))
    is_refused(case, "v_cache", "k_cache's dtype", v_cache=case["v_cache"].half())
    is_refused(case, "k_cache", "float16, float8_e4m3fn or float8_e5m2",
               k_cache=case["k_cache"].to(torch.bfloat16))  # fmt: skip
    is_refused(case, "k_scale", "float32", k_scale=torch.ones(2, device=device).half())
    is_refused(case, "k_scale", "[num_heads_kv]", k_scale=torch.ones(3, device=device))
    is_refused(case, "v_scale", "[batch, num_heads_kv]", v_scale=torch.ones(2, 2, device=device))
    plain = make_case(device, torch.float16)
    is_refused(plain, "k_scale", "float8 caches only", k_scale=torch.ones(1, device=device))
    if device == "cpu":
        is_refused(case, "k_cache", "float32", q=case["q"].float())
