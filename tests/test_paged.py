"""Paged caches: the result of the same tokens in contiguous caches, wherever the pages lie.

Pages are in random order. All memory that is no token of a sequence is NaN, and table entries that
nobody needs are far out of range, so whatever is read or counted beyond its place shows.
"""

import math
import re

import pytest
import torch
from cases import check, int32, make_case, offsets, run, sharp_dtype
from paging import LAYOUTS, UNUSED_ENTRY, ceil_div, gather, paginate
from reference import assert_close, assert_same_bits
from test_errors import Wrong, assert_refused, replace
from test_needles import census_case, needle_case
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import leanattn

pytestmark = pytest.mark.usefixtures("loader")

OPS = torch.ops.leanattn

# Parts of a tile and whole tiles, divisors of a tile and not, multiples of 8 and not.
PAGE_SIZES = [1, 3, 8, 16, 24, 48, 64, 100, 128, 136, 256, 1000]
FEW_PAGE_SIZES = [1, 16, 24, 100, 256]
UNIT_COUNTS = [1, 3, 16, 64]


def check_paged(case, page_size, **options):
    """The paged call's result against fp64 on the contiguous caches."""
    out, lse = run(paginate(case, page_size, **options))
    assert_close(out, lse, **case)
    return out, lse


def check_gathered(call):
    """A paged call's result against fp64 on what its table points to."""
    out, lse = run(call)
    assert_close(out, lse, **gather(call))
    return out, lse


# --- Page sizes, layouts, needles ----------------------------------------------------------------


@pytest.mark.parametrize("dims", [(64, 64), (192, 128)], ids=["128-token-tile", "64-token-tile"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_page_size(page_size, dims, device, dtype):
    """Lengths on and beside the edges of pages and tiles, and empty sequences."""
    lengths = {0, 1, 63, 64, 129, 300, page_size - 1, page_size, page_size + 1, 2 * page_size}
    check_paged(make_case(device, dtype, dims=dims, lengths=sorted(lengths)), page_size)


@pytest.mark.parametrize("dims", [(8, 8), (40, 128), (128, 128), (256, 256)])
def test_head_dims_of_paged_caches(dims, device, dtype):
    """Columns beyond the head dim belong to the next head or to V."""
    case = make_case(device, dtype, dims=dims, lengths=(5, 200, 129), heads=(6, 2))
    for page_size in (16, 20):
        check_paged(case, page_size, layout="packed-heads-first")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [3, 16, 24, 256])
def test_layout_of_the_pages(page_size, layout, device, dtype):
    """Strides as engines have them."""
    case = make_case(device, dtype, lengths=(5, 200, 0, 129), heads=(6, 3))
    check_paged(case, page_size, layout=layout)


@pytest.mark.parametrize("page_size", FEW_PAGE_SIZES)
@pytest.mark.parametrize("units", UNIT_COUNTS)
def test_needle_at_every_page_edge(units, page_size, device, force_units):
    """The first or last key of a page or of a unit's share lost, exchanged or counted twice."""
    force_units(units)
    length = 517
    steps = range(0, length, max(page_size, 16))
    edges = {edge + side for edge in steps for side in (-1, 0, 1)} | {length - 1}
    edges = sorted(edge for edge in edges if 0 <= edge < length)
    case = needle_case(device, sharp_dtype(device), edges, length)
    check_paged(case, page_size)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_census_of_pages(page_size, device, dtype, force_units):
    """Each key of each page is counted once, and with its own value."""
    lengths = (777, 0, 1, 64, 128, 300, 65)
    for units, dims in ((1, (64, 72)), (5, (64, 72)), (16, (256, 256))):
        force_units(units)
        case = census_case(device, dtype, lengths, dims=dims, heads=(2, 1), seqlen_q=2)
        check_paged(case, page_size)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("units", [1, 7])
def test_paged_and_contiguous_give_the_same_bits(units, page_size, device, dtype, force_units):
    """With the same number of units nothing but the place of a token differs."""
    force_units(units)
    case = make_case(device, dtype, lengths=(500, 0, 129, 3), seqlen_q=3, heads=(6, 2))
    for actual, expected in zip(run(paginate(case, page_size)), run(case)):
        assert_same_bits(actual, expected)


def test_any_order_of_the_pages_gives_the_same_bits(device, dtype):
    """Ascending, descending or mixed up."""
    case = make_case(device, dtype, lengths=(500, 0, 129, 3), heads=(6, 2))
    results = [run(paginate(case, 16, seed=seed)) for seed in range(4)]
    for result in results[1:]:
        for actual, expected in zip(result, results[0]):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(seqlen_q=None),
        dict(seqlen_q=5, window_left=70),
        dict(seqlen_q=5, causal=False, window_left=9, window_right=2),
        dict(query_lengths=(3, 0, 12)),
        dict(query_lengths=(3, 0, 12), window_left=33),
        dict(seqlen_q=2, sinks=True, alibi="batch", softcap=4.0),
        dict(seqlen_q=40, heads=(4, 1)),
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("page_size", FEW_PAGE_SIZES)
def test_options_on_pages(page_size, options, device, dtype, force_units):
    """Masks, ragged queries, score modifications, several row blocks."""
    for units in (2, 16):
        force_units(units)
        check_paged(make_case(device, dtype, lengths=(400, 129, 30), **options), page_size)


def test_without_lengths_all_entries_count(device, dtype):
    """cache_seqlens=None: max_pages * page_size tokens each."""
    for page_size, pages in ((16, 9), (100, 2), (1, 130)):
        lengths = (page_size * pages,) * 3
        case = make_case(device, dtype, lengths=lengths, capacity=lengths[0])
        call = paginate(case, page_size, spare_entries=0)
        del call["cache_seqlens"]
        out, lse = run(call)
        assert_close(out, lse, **case)


# --- What must not matter ------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("page_size", FEW_PAGE_SIZES)
@pytest.mark.parametrize(
    "options", [{}, dict(window_left=70), dict(seqlen_q=5)], ids=lambda options: "-".join(options)
)
def test_unused_tokens_change_no_bit(options, page_size, poison, device, dtype):
    """Tails of pages, pages of nobody, tokens before the window: whatever they hold."""
    case = make_case(device, dtype, lengths=(200, 0, 65, 300), poison=0.0, **options)
    call = paginate(case, page_size)
    results = []
    for value in (0.0, poison):
        filled = dict(call)
        for name in ("k_cache", "v_cache"):
            filled[name] = torch.where(call[name].isnan(), value, call[name])
        results.append(run(filled))
    for actual, expected in zip(*reversed(results)):
        assert_same_bits(actual, expected)
    assert_close(*results[0], **case)


def unused_entries(call):
    """[B, max_pages] of bool: the entries of no visible key, with one query a sequence."""
    table, lengths = call["block_table"], call["cache_seqlens"].long()
    page_size = call["k_cache"].shape[1]
    begin = torch.zeros_like(lengths)
    if call.get("window_left", -1) >= 0:
        begin = (lengths - 1 - call["window_left"]).clamp(min=0)
    first, last = begin // page_size, (lengths + page_size - 1) // page_size
    index = torch.arange(table.shape[1], device=table.device)
    return (index < first[:, None]) | (index >= last[:, None])


@pytest.mark.parametrize("junk", ["far", "negative", "minimum", "nan-page", "no-such-page"])
@pytest.mark.parametrize("page_size", FEW_PAGE_SIZES)
@pytest.mark.parametrize("window_left", [-1, 100])
def test_unused_entries_change_no_bit(window_left, page_size, junk, device, dtype):
    """Entries beyond the length and, with a window, those before it: out of range, or the number
    of a page of NaN."""
    case = make_case(device, dtype, lengths=(200, 0, 65, 400), window_left=window_left)
    call = paginate(case, page_size)
    num_pages = call["k_cache"].shape[0]
    used = call["block_table"][~unused_entries(call)].tolist()
    nan_page = next(page for page in range(num_pages) if page not in used)
    values = {"far": UNUSED_ENTRY, "negative": -1, "minimum": -(2**31), "nan-page": nan_page,
              "no-such-page": num_pages}  # fmt: skip
    call["block_table"][unused_entries(call)] = values[junk]
    assert junk != "nan-page" or call["k_cache"][nan_page].isnan().all()
    out, lse = run(call)
    assert_close(out, lse, **case)
    expected = run(paginate(case, page_size))
    assert_same_bits(out, expected[0])
    assert_same_bits(lse, expected[1])


def test_nan_in_a_page_shows_where_it_is_seen(device, dtype):
    """In every sequence that has the page, in no other."""
    case = make_case(device, dtype, lengths=(200, 65, 130))
    call = paginate(case, 16)
    call["block_table"][2, 3] = call["block_table"][0, 7]
    call["k_cache"][call["block_table"][0, 7].long(), 5, 1] = math.nan
    out, lse = check_gathered(call)
    assert out[0, :, 2:].isnan().all() and out[2, :, 2:].isnan().all()
    assert not out[1].isnan().any() and not out[:, :, :2].isnan().any()


# --- Tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", FEW_PAGE_SIZES)
def test_shared_pages(page_size, device, dtype):
    """A common prefix stored once, and a sequence that is the same page again and again."""
    case = make_case(device, dtype, lengths=(900, 700, 333, 900))
    call = paginate(case, page_size)
    prefix = 300 // page_size
    call["block_table"][1:3, :prefix] = call["block_table"][0, :prefix]
    call["block_table"][3] = call["block_table"][0, 0]
    check_gathered(call)


@pytest.mark.parametrize("page_size", FEW_PAGE_SIZES)
def test_wrong_page_ids_are_clamped(page_size, device, dtype, force_units):
    """Negative ones to page 0, those beyond the end to the last page; nothing faults."""
    for units in (1, 16):
        force_units(units)
        case = make_case(device, dtype, lengths=(600, 0, 333))
        call = paginate(case, page_size, spare_pages=0)
        num_pages = call["k_cache"].shape[0]
        for name in ("k_cache", "v_cache"):
            call[name].nan_to_num_()
        wrong = int32([-1, -(2**31), num_pages, 2**31 - 1, UNUSED_ENTRY, -7], device)
        entries = ceil_div(600, page_size)
        for i in range(0, entries, 2):
            call["block_table"][0, i] = wrong[i // 2 % len(wrong)]
        check_gathered(call)
        call["block_table"][:] = wrong.repeat(call["block_table"].numel())[
            : call["block_table"].numel()
        ].view_as(call["block_table"])
        check_gathered(call)


@pytest.mark.parametrize("page_size", [1, 16, 100])
def test_lengths_are_clamped_to_the_table(page_size, device, dtype):
    """Capacity is max_pages * page_size; negative lengths are 0."""
    case = make_case(device, dtype, lengths=(300, 300, 300), capacity=300)
    call = paginate(case, page_size, spare_entries=0)
    call["cache_seqlens"] = int32([2**31 - 1, -5, 302], device)
    for name in ("k_cache", "v_cache"):
        call[name].nan_to_num_()
    check_gathered(call)


TABLE_VIEWS = {
    "row-stride": lambda t: torch.full((t.shape[0], t.shape[1] + 5), -9).int()[:, 2:-3],
    "every-other-entry": lambda t: torch.full((t.shape[0], 2 * t.shape[1]), -9).int()[:, 1::2],
    "transposed": lambda t: torch.full((t.shape[1], t.shape[0]), -9).int().t(),
    "odd-pointer": lambda t: torch.full((t.numel() + 1,), -9).int()[1:].view(t.shape),
}


@pytest.mark.parametrize("view", TABLE_VIEWS)
def test_strides_of_the_table(view, device, dtype):
    """Rows of any stride, entries of any stride, on a 4-byte boundary."""
    case = make_case(device, dtype, lengths=(200, 0, 65, 300))
    for page_size in (1, 16, 100):
        call = paginate(case, page_size)
        table = call["block_table"]
        strided = TABLE_VIEWS[view](table)
        memory = strided.untyped_storage().nbytes() // 4
        on_device = strided.as_strided((memory,), (1,), 0).to(device)
        strided = on_device.as_strided(strided.shape, strided.stride(), strided.storage_offset())
        call["block_table"] = strided.copy_(table)
        assert view == "odd-pointer" or not call["block_table"].is_contiguous()
        out, lse = run(call)
        assert_close(out, lse, **case)


def test_one_row_of_a_table_for_all(device, dtype):
    """Stride 0 in the table: every sequence has the same pages, of which each sees its own part."""
    case = make_case(device, dtype, lengths=(200,) * 3, poison=None)
    call = paginate(case, 16)
    call["block_table"] = call["block_table"][:1].expand(3, -1)
    call["cache_seqlens"] = int32([200, 7, 130], device)
    check_gathered(call)


@pytest.mark.parametrize("stride", [1, 3, 2**31 + 1, 2**50])
def test_strides_of_a_single_page_row_or_head_mean_nothing(stride, device, dtype):
    """torch leaves anything there; neither a tensor map nor an offset must look at it."""
    for page_size, length, heads in ((256, 200, (2, 2)), (1, 1, (2, 2)), (16, 90, (2, 1))):
        case = make_case(device, dtype, lengths=(length,), heads=heads)
        call = paginate(case, page_size, spare_pages=0, spare_entries=0)
        for name in ("k_cache", "v_cache", "block_table"):
            tensor = call[name]
            strides = [stride if n == 1 else old for n, old in zip(tensor.shape, tensor.stride())]
            call[name] = tensor.as_strided(tensor.shape, strides)
        out, lse = run(call)
        assert_close(out, lse, **case)


def test_page_stride_zero(device, dtype):
    """All pages one page of memory."""
    case = make_case(device, dtype, lengths=(200, 65), poison=None)
    call = paginate(case, 16, spare_pages=0)
    for name in ("k_cache", "v_cache"):
        call[name] = call[name].nan_to_num()[:1].expand(call[name].shape)
    check_gathered(call)


@pytest.mark.parametrize("page_size", [1, 16, 1000, 2**20])
def test_capacity_beyond_2_to_the_31(page_size, device):
    """More entries than an int counts tokens for: lengths are what they are. The table repeats
    one entry, the cache one token, so neither takes memory."""
    case = make_case(device, sharp_dtype(device), lengths=(200,), heads=(1, 1), seqlen_q=2)
    pages = 2**31 // page_size + 5
    call = dict(case, block_table=int32([[1]], device).expand(1, pages))
    for name in ("k_cache", "v_cache"):
        call[name] = case[name][:, :1].expand(2, page_size, 1, 64)
    case = dict(case, **{name: call[name][1:, :1].expand(1, 200, 1, 64)
                         for name in ("k_cache", "v_cache")})  # fmt: skip
    out, lse = run(call)
    assert_close(out, lse, **case)


def test_pages_beyond_2_to_the_31_elements(device):
    """The last page of a pool that a 32-bit offset does not reach."""
    page_elements = 16 * 2 * 128
    num_pages = 2**31 // page_elements + 3
    try:
        memory = torch.empty(num_pages * page_elements, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("not enough memory for a cache of 2^31 elements")
    cache = memory.view(num_pages, 16, 2, 128)
    pages = [num_pages - 1, 0, num_pages - 2, 1]
    tokens = torch.randn(len(pages), 16, 2, 128).half().to(device)
    for page, values in zip(pages, tokens):
        cache[page] = values
    q = torch.randn(1, 1, 4, 128).half().to(device)
    call = dict(q=q, k_cache=cache, v_cache=cache, cache_seqlens=int32([60], device))
    out, lse = run({**call, "block_table": int32([pages], device)})
    contiguous = tokens.flatten(0, 1)[None]
    assert_close(out, lse, **{**call, "k_cache": contiguous, "v_cache": contiguous})


@pytest.mark.parametrize(
    "pages, max_pages, batch", [(0, 3, 2), (3, 0, 2), (0, 0, 2), (3, 3, 0), (0, 0, 0)]
)
@pytest.mark.parametrize("length", [0, 40, None])
def test_no_pages_no_entries_no_sequences(length, pages, max_pages, batch, device):
    """Capacity 0, or no batch: rows that see no key, whatever the lengths and the table say."""
    dtype = sharp_dtype(device)
    call = dict(
        q=torch.randn(batch, 2, 4, 64, device=device).to(dtype),
        k_cache=torch.zeros(pages, 16, 2, 64, device=device, dtype=dtype),
        v_cache=torch.zeros(pages, 16, 2, 32, device=device, dtype=dtype),
        block_table=int32([[UNUSED_ENTRY] * max_pages] * batch, device).view(batch, max_pages),
        sinks=torch.randn(4, device=device),
    )
    if length is not None:
        call["cache_seqlens"] = int32([length] * batch, device)
    out, lse = run(call)
    assert out.shape == (batch, 2, 4, 32) and (out == 0).all()
    assert (lse == call["sinks"]).all()


def test_many_sequences_of_few_pages(device):
    """More sequences than units: every page id of a share's next sequences is looked up ahead."""
    lengths = [(7 * i) % 40 for i in range(1500)]
    case = make_case(device, sharp_dtype(device), heads=(2, 1), dims=(16, 16), lengths=lengths)
    for page_size in (1, 16):
        check_paged(case, page_size)


def test_long_sequence_of_small_pages(device, dtype):
    """Many tiles of one sequence in one share: lookups run ahead over whole rings."""
    length = 5000 if device == "cpu" else 100_000
    case = make_case(device, dtype, heads=(4, 1), lengths=(length, 77))
    for page_size in (1, 16):
        check_paged(case, page_size)


def test_calls_with_other_pages_leave_nothing_behind(device, dtype):
    """Shared memory keeps what the last call left there: NaN of a page, now beyond a length."""
    case = make_case(device, dtype, lengths=(300, 290))
    clean = run(paginate(case, 16))
    for page_size in (1, 16, 256):
        call = paginate(case, page_size)
        full_of_nan = {name: torch.full_like(call[name], math.nan)
                       for name in ("k_cache", "v_cache")}  # fmt: skip
        run({**call, **full_of_nan})
        out, lse = run(call)
        assert_close(out, lse, **case)
    for actual, expected in zip(run(paginate(case, 16)), clean):
        assert_same_bits(actual, expected)


# --- Errors --------------------------------------------------------------------------------------


def good_call(device, **options):
    """B 2, Sq 3, 4 query heads, 2 KV heads, D 64, Dv 32, 9 pages of 16 tokens."""
    return paginate(
        make_case(device, sharp_dtype(device), seqlen_q=3, dims=(64, 32), lengths=(50, 20),
                  **options),
        16, spare_pages=3,
    )  # fmt: skip


def ragged_call(device):
    case = make_case(device, sharp_dtype(device), query_lengths=(3, 2), dims=(64, 32),
                     lengths=(50, 20))  # fmt: skip
    return paginate(case, 16)


def cast_table(dtype):
    return lambda call, device: {"block_table": call["block_table"].to(dtype)}


MISTAKES = {
    "table-int64": Wrong(cast_table(torch.int64), ("block_table",), (torch.int64,), good_call),
    "table-float": Wrong(cast_table(torch.float32), ("block_table",), (torch.float32,), good_call),
    "table-1d": Wrong(replace(block_table=(4,)), ("block_table",), ((4,),), good_call),
    "table-3d": Wrong(replace(block_table=(2, 4, 1)), ("block_table",), ((2, 4, 1),), good_call),
    "table-batch": Wrong(replace(block_table=(7, 4)), ("block_table",), (7, 2), good_call),
    "table-batch-ragged": Wrong(replace(block_table=(7, 4)), ("block_table",), (7, 2), ragged_call),
    "q-batch": Wrong(replace(q=(7, 3, 4, 64)), ("block_table",), (7, 2), good_call),
    "cache-seqlens": Wrong(replace(cache_seqlens=(5,)), ("cache_seqlens",), (5, 2), good_call),
    "k-cache-3d": Wrong(replace(k_cache=(9, 16, 64)), ("k_cache",), ((9, 16, 64),), good_call),
    "v-cache-pages": Wrong(replace(v_cache=(4, 16, 2, 32)), ("v_cache",), (4, 9), good_call),
    "v-cache-page-size": Wrong(replace(v_cache=(9, 15, 2, 32)), ("v_cache",), (15, 16), good_call),
    "page-size-0": Wrong(
        replace(k_cache=(9, 0, 2, 64), v_cache=(9, 0, 2, 32)), ("k_cache",), (0, 1), good_call
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_with_pages(name, device):
    """One wrong argument in an otherwise good paged call."""
    wrong = MISTAKES[name]
    call = wrong.base(device)
    assert_refused({**call, **wrong.change(call, device)}, wrong.arguments, wrong.values)


def test_message_speaks_of_pages(device):
    """What is allowed is told in the shapes of the paged call."""
    call = good_call(device)
    for name in ("k_cache", "v_cache"):
        with pytest.raises((RuntimeError, ValueError), match=r"\[num_pages, page_size"):
            OPS.decode(**{**call, **replace(**{name: (9, 16, 64)})(call, device)})


def test_contiguous_caches_with_a_table_of_another_batch(device):
    """A forgotten or superfluous block_table shows in the shapes."""
    call = good_call(device)
    del call["block_table"]
    assert_refused(call, ("k_cache",), (9, 2))


def test_page_size_not_a_power_of_two_is_supported(device):
    """is_supported says what decode does."""
    case = make_case(device, sharp_dtype(device))
    for page_size in (1, 7, 24):
        assert leanattn.is_supported(**paginate(case, page_size)) == (True, "")
    supported, reason = leanattn.is_supported(
        **{**paginate(case, 16), "block_table": torch.zeros(3, 4, device=device)}
    )
    assert not supported and re.search("block_table.*int32", reason)


@pytest.mark.parametrize("page", [-1, 9, 2**31 - 1, -(2**31)])
def test_check_mode_refuses_page_ids_that_would_be_clamped(page, device, monkeypatch):
    """LEANATTN_CHECK=1 finds the caller's bug, in entries that are read and in no others."""
    call = good_call(device)
    assert call["k_cache"].shape[0] == 9
    monkeypatch.setenv("LEANATTN_CHECK", "1")
    OPS.decode(**call)
    for row, index in ((0, 0), (0, 3), (1, 1)):
        wrong = {**call, "block_table": call["block_table"].clone()}
        wrong["block_table"][row, index] = page
        assert_refused(wrong, ("block_table",), (page, 8, row, index))
    monkeypatch.setenv("LEANATTN_CHECK", "0")
    OPS.decode(**wrong)


def test_check_mode_knows_what_is_read(device, monkeypatch):
    """Entries before the window, of empty sequences and of sequences without queries may be
    anything; a strided table is read by its strides."""
    monkeypatch.setenv("LEANATTN_CHECK", "1")
    call = good_call(device, window_left=10)
    call["block_table"][0, :2] = -5
    OPS.decode(**call)
    call["block_table"] = call["block_table"].t().contiguous().t()
    OPS.decode(**call)
    assert_refused({**call, "window_left": 20}, ("block_table",), (-5,))
    call = ragged_call(device)
    call["block_table"][1] = -5
    OPS.decode(**{**call, "cu_seqlens_q": offsets([5, 0], device)})
    assert_refused(call, ("block_table",), (-5,))
    OPS.decode(**{**call, "cache_seqlens": int32([50, 0], device)})


def test_meta_table_among_real_tensors(device):
    """No memory, no table."""
    call = good_call(device)
    call["block_table"] = call["block_table"].to("meta")
    assert_refused(call, ("block_table",), ("meta",))


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_table_on_the_cpu(device):
    """A host pointer in a kernel is a fault that kills the process's CUDA context."""
    call = good_call(device)
    call["block_table"] = call["block_table"].cpu()
    assert_refused(call, ("block_table",), ("cpu",))


# --- Within torch --------------------------------------------------------------------------------


def test_python_decode_of_pages(device):
    """The wrapper hands the table on, by position and by name."""
    call = good_call(device)
    expected, expected_lse = run(call)
    out, lse = leanattn.decode(**call, return_lse=True)
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)
    names = ("q", "k_cache", "v_cache", "cache_seqlens", "block_table")
    assert_same_bits(leanattn.decode(*(call[name] for name in names)), expected)


@pytest.mark.parametrize("ragged", [False, True], ids=["", "ragged"])
def test_opcheck_of_pages(ragged, device):
    """Schema, fake and dynamic tracing with a block_table."""
    call = ragged_call(device) if ragged else good_call(device)
    for name in ("k_cache", "v_cache"):
        call[name].nan_to_num_()
    torch.library.opcheck(OPS.decode.default, (), call)
    torch.library.opcheck(OPS.decode_with_lse.default, (), call)
    out, lse = run(call)
    torch.library.opcheck(OPS.decode_out.default, (), {**call, "out": out})
    torch.library.opcheck(OPS.decode_with_lse_out.default, (), {**call, "out": out, "lse": lse})


def test_fake_of_a_paged_call():
    """Shapes come from q and v_cache, whose first dimension is no batch."""
    with FakeTensorMode():
        q = torch.empty(5, 1, 8, 64, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(100, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
        v = torch.empty(100, 16, 2, 32, device="cuda", dtype=torch.bfloat16)
        table = torch.empty(5, 40, device="cuda", dtype=torch.int32)
        out, lse = OPS.decode_with_lse(q, k, v, None, table)
        assert out.shape == (5, 1, 8, 32) and lse.shape == (5, 1, 8)
        with pytest.raises(RuntimeError, match="block_table"):
            OPS.decode(q, k, v, None, table.cpu())


def test_compile_with_dynamic_tables(device):
    """More pages, a wider table, another batch: no graph for each."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(q, k_cache, v_cache, cache_seqlens, block_table):
        return OPS.decode(q * 2, k_cache, v_cache, cache_seqlens, block_table) + 1

    for lengths in ((40, 3), (150, 7, 30), (37, 1, 2, 90), (256,) * 6):
        call = paginate(make_case(device, sharp_dtype(device), lengths=lengths), 16)
        expected = OPS.decode(**{**call, "q": call["q"] * 2}) + 1
        assert_same_bits(compiled(**call), expected)
        if len(lengths) == 3:
            after_dynamic = counter.frame_count
    assert counter.frame_count == after_dynamic <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16, 24])
def test_graph_replay_with_other_tables(page_size, device):
    """A replay reads the table and the lengths that it finds."""
    case = make_case(device, torch.bfloat16, lengths=(900,) * 4, capacity=900, heads=(8, 2))
    call = paginate(case, page_size)
    out, lse = run(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.decode_with_lse_out(**call, out=out, lse=lse)
    for seed, lengths in enumerate([(900, 33, 0, 517), (0, 0, 0, 0), (1, 900, 128, 899)]):
        call["cache_seqlens"].copy_(int32(lengths, device))
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
        call["block_table"].copy_(call["block_table"][order.to(device)])
        graph.replay()
        expected, expected_lse = run(call)
        assert_same_bits(out, expected)
        assert_same_bits(lse, expected_lse)
        whole = {**call, "block_table": call["block_table"][:, : ceil_div(900, page_size)]}
        assert_close(out, lse, **gather(whole))


def test_pages_match_a_check_of_contiguous_caches(device):
    """The helper itself: gathering what paginate scattered gives the tokens back."""
    case = make_case(device, sharp_dtype(device), lengths=(200, 0, 65), poison=None)
    back = gather(paginate(case, 24, layout="packed-heads-first"))
    for sequence, length in enumerate((200, 0, 65)):
        for name in ("k_cache", "v_cache"):
            assert torch.equal(back[name][sequence, :length], case[name][sequence, :length])
    check(case)
