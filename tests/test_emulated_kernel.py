"""The CUDA kernel's logic, thread by thread on a CPU; emulator/emulator.h says what this can show.

Every run checks that no warp diverges at a collective, that nobody waits for ever, that counters
end at zero and that no copy is in flight at the end; copies land late, and warps run in random
order.
"""

from random import Random

import pytest
import torch
from cases import make_case
from paging import paginate
from reference import assert_close, assert_same_bits

LAYOUTS = {  # units, items a team takes, units a team, and a cluster
    "stream-k-1": (1, 0, 1, 1),
    "stream-k-3": (3, 0, 1, 1),
    "stream-k-13": (13, 0, 1, 1),
    "stream-k-100": (100, 0, 1, 1),
    "whole-items": (None, 1, 1, 1),
    "three-items": (None, 3, 1, 1),
    "teams-of-3": (None, 1, 3, 1),
    "clusters-of-2": (None, 1, 2, 2),
    "clusters-of-5": (None, 1, 5, 5),
    "two-clusters-of-3": (None, 1, 6, 3),
    "nine-clusters-of-2": (None, 1, 18, 2),
}
# Multi-head latent attention.
LATENT = dict(heads=(16, 1), dims=(576, 512), values_in_keys=True)
# rows an item, whether by wgmma, options
CASES = {
    "ragged": (8, False, dict(lengths=(300, 5, 0, 700))),
    "uniform": (8, False, dict(lengths=None, batch=3, capacity=500)),
    "one-sequence": (8, False, dict(lengths=(900,))),
    "window": (8, False, dict(lengths=(900, 100), window_left=300, seqlen_q=2)),
    "more-queries-than-keys": (8, False, dict(lengths=(3, 300), seqlen_q=9)),
    "two-row-blocks-of-16": (16, False, dict(lengths=(300, 200), heads=(40, 2))),
    "32-rows": (32, False, dict(lengths=(300, 200), heads=(40, 2), dims=(128, 104))),
    "head-dim-192": (8, False, dict(lengths=(300, 90), dims=(192, 256))),
    "wgmma-32-rows": (32, True, dict(lengths=(300, 0, 200), heads=(40, 2), dims=(104, 128))),
    "wgmma-window": (64, True, dict(lengths=(500, 90), heads=(18, 1), seqlen_q=3, window_left=130)),
    "wgmma-128-rows": (128, True, dict(lengths=(300, 200), heads=(71, 1))),
    "wgmma-two-row-blocks": (64, True, dict(lengths=(300,), heads=(71, 1))),
    "wgmma-head-dim-192": (64, True, dict(lengths=(300, 90), heads=(40, 1), dims=(256, 192))),
    "wide": (16, False, dict(lengths=(200, 0, 45), heads=(20, 2), dims=(512, 264))),
    "wgmma-wide": (64, True, dict(lengths=(150, 45), heads=(20, 1), dims=(264, 512))),
    "latent": (16, False, dict(LATENT, lengths=(200, 45), window_left=70, seqlen_q=3)),
    "keys-as-rows": (16, True, dict(lengths=(300, 0, 45), heads=(20, 2), dims=(512, 264))),
    "keys-as-rows-latent": (16, True, dict(LATENT, lengths=(200, 45), window_left=70, seqlen_q=3)),
    "keys-as-rows-32": (32, True, dict(LATENT, lengths=(300, 64, 7), heads=(27, 1))),
    "keys-as-rows-32-queries": (
        32,
        True,
        dict(LATENT, lengths=(200, 45), seqlen_q=4, heads=(9, 1)),
    ),
    "wgmma-latent": (64, True, dict(LATENT, lengths=(150, 45), window_left=70, seqlen_q=3)),
}
PAGE_SIZES = [1, 3, 8, 24, 64, 100, 256]


@pytest.fixture
def emulate(emulated_kernel):
    """A function that runs a case and returns (out, lse)."""

    def bits(tensor):
        return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.uint16).numpy()

    def emulate(
        case, rows, layout, *, tma=True, stages=3, seed=1, slack_tiles=1 << 20, wgmma=False,
        head_pairs=False, features="all",
    ):  # fmt: skip
        q = case["q"]
        num_units, items_per_team, team_size, cluster_size = layout
        if num_units is None:
            table = case.get("block_table", case["k_cache"])
            heads_kv = case["k_cache"].shape[2] // (2 if head_pairs else 1)
            group_size = q.shape[-2] // heads_kv
            queries = q.shape[1] if q.dim() == 4 else 1
            blocks = -(-queries * group_size // rows)
            items = table.shape[0] * heads_kv * blocks
            num_units = -(-items // items_per_team) * team_size
        arrays = {
            name: case[name].numpy() if name in case else None
            for name in ("cache_seqlens", "block_table", "cu_seqlens_q", "k_scale", "v_scale")
        }
        out, lse = emulated_kernel.decode(
            q=bits(q), k=bits(case["k_cache"]), v=bits(case["v_cache"]), **arrays,
            window_left=case.get("window_left", -1), window_right=0, scale=q.shape[-1] ** -0.5,
            rows=rows, num_units=num_units, items_per_team=items_per_team, team_size=team_size,
            cluster_size=cluster_size, slack_tiles=slack_tiles, tma=tma, stages=stages, wgmma=wgmma,
            seed=seed, bf16=q.dtype == torch.bfloat16,
            e5m2=case["k_cache"].dtype == torch.float8_e5m2,
            batch_invariant=case.get("batch_invariant", False), head_pairs=head_pairs,
            features=features,
        )  # fmt: skip
        out = torch.from_numpy(out).view(q.dtype).view(*q.shape[:-1], -1)
        return out, torch.from_numpy(lse).view(q.shape[:-1])

    return emulate


def hold(result, case):
    assert_close(*result, **{k: v for k, v in case.items() if k != "batch_invariant"})


@pytest.mark.parametrize("tma", [True, False], ids=["tma", "cp_async"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_layout(name, layout, tma, emulate):
    rows, wgmma, options = CASES[name]
    case = make_case("cpu", torch.float16, **options)
    hold(emulate(case, rows, LAYOUTS[layout], tma=tma, wgmma=wgmma), case)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name, emulate):
    rows, wgmma, options = CASES[name]
    case = make_case("cpu", torch.bfloat16, **options)
    hold(emulate(case, rows, LAYOUTS["stream-k-3"], wgmma=wgmma), case)


@pytest.mark.parametrize(
    "rows, wgmma, heads, dims",
    [
        (8, False, (2, 2), (64, 64)),
        (16, False, (5, 1), (64, 64)),
        (64, True, (20, 1), (64, 64)),
        (128, True, (35, 1), (64, 64)),
        (32, True, (20, 2), (128, 128)),
        (64, True, (18, 1), (256, 256)),
        (16, False, (5, 1), (576, 512)),
        (16, True, (5, 1), (576, 512)),
        (32, True, (8, 1), (576, 512)),
        (64, True, (12, 1), (576, 512)),
    ],
)
@pytest.mark.parametrize("units", [1, 3])
def test_nan_shows_only_where_it_is_seen(rows, wgmma, heads, dims, units, emulate):
    """Values that some rows of an item see and others do not, by the edges of mask and window."""
    options = dict(heads=heads, dims=dims, seqlen_q=3, window_left=150)
    for lengths in [(300,), (1,), (257, 130)]:
        case = make_case("cpu", torch.float16, lengths=lengths, **options)
        for key in {lengths[0] - 1, max(lengths[0] - 2, 0), max(lengths[0] - 2 - 150, 0)}:
            case["v_cache"][0, key, -1, key % dims[1]] = torch.nan
            case["v_cache"][0, key, -1, 3] = torch.inf
        hold(emulate(case, rows, (units, 0, 1, 1), wgmma=wgmma), case)


@pytest.mark.parametrize(
    "rows, heads, dims", [(64, 20, (64, 64)), (16, 10, (576, 512)), (64, 40, (576, 512))]
)
def test_nan_behind_the_last_token_that_there_can_be(rows, heads, dims, emulate):
    """Of 2^31 - 1 tokens the last tile has room for one more, which wgmma must not meet."""
    case = make_case("cpu", torch.float16, lengths=(255,), heads=(heads, 1), dims=dims)
    case = paginate(case, 256)
    case["window_left"] = 20
    case["v_cache"][:, 255] = torch.nan
    short = emulate(case, rows, LAYOUTS["stream-k-1"], wgmma=True)
    assert short[0].isfinite().all()
    page = case["block_table"][0, 0].item()
    case["block_table"] = torch.full((1, 1 << 23), page, dtype=torch.int32)
    case["cache_seqlens"] = torch.tensor([2**31 - 1], dtype=torch.int32)
    for ours, others in zip(emulate(case, rows, LAYOUTS["stream-k-1"], wgmma=True), short):
        assert_same_bits(ours, others)


@pytest.mark.parametrize("layout", ["stream-k-3", "whole-items", "two-clusters-of-3"])
@pytest.mark.parametrize("rows, heads", [(16, 16), (64, 40)])
def test_lean_wide_heads(rows, heads, layout, emulate):
    """They give the bits of the kernel with everything."""
    options = dict(LATENT, lengths=(300, 0, 77, 64), heads=(heads, 1))
    case = make_case("cpu", torch.bfloat16, **options)
    lean = emulate(case, rows, LAYOUTS[layout], wgmma=True, features="lean")
    hold(lean, case)
    for ours, others in zip(lean, emulate(case, rows, LAYOUTS[layout], wgmma=True)):
        assert_same_bits(ours, others)


LEAN_CASES = {
    "ragged": (8, torch.float16, dict(lengths=(300, 5, 0, 700))),
    "uniform": (8, torch.float16, dict(lengths=None, batch=3, capacity=500)),
    "one-sequence": (8, torch.float16, dict(lengths=(900,))),
    "nothing": (8, torch.float16, dict(lengths=(0, 0))),
    "16-rows": (16, torch.bfloat16, dict(lengths=(300, 200), heads=(20, 2))),
    "head-dim-40": (8, torch.float16, dict(lengths=(300, 5), dims=(40, 64))),
    "head-dim-80": (8, torch.float16, dict(lengths=(300, 5), dims=(80, 104))),
    "head-dim-192": (8, torch.float16, dict(lengths=(300, 90), dims=(192, 256))),
    "window": (8, torch.float16, dict(lengths=(900, 5, 0, 300), window_left=299)),
    "window-of-one": (8, torch.float16, dict(lengths=(900, 129), window_left=0)),
}
MASKED_CASES = {
    "plain": (8, dict(lengths=(300, 5, 0, 700), dims=(128, 128))),
    "window": (8, dict(lengths=(900, 100), window_left=300, seqlen_q=2, dims=(128, 128))),
    "more-queries-than-keys": (8, dict(lengths=(3, 300), seqlen_q=9, dims=(128, 128))),
    "ragged-queries": (8, dict(lengths=(300, 5, 200), query_lengths=[3, 0, 9], dims=(128, 128))),
    "two-row-blocks-of-16": (16, dict(lengths=(300, 200), heads=(40, 2))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LEAN_CASES)
def test_a_lean_kernel_gives_the_same_bits(name, layout, emulate):
    """As the one with all features, by the same layout."""
    rows, dtype, options = LEAN_CASES[name]
    case = make_case("cpu", dtype, **dict(dims=(128, 128)) | options)
    lean = emulate(case, rows, LAYOUTS[layout], features="lean")
    hold(lean, case)
    full = emulate(case, rows, LAYOUTS[layout])
    for one, other in zip(lean, full):
        assert_same_bits(one, other)


@pytest.mark.parametrize("layout", ["stream-k-3", "stream-k-13", "whole-items", "clusters-of-2"])
@pytest.mark.parametrize("name", MASKED_CASES)
def test_a_masked_kernel_gives_the_same_bits(name, layout, emulate):
    rows, options = MASKED_CASES[name]
    if "query_lengths" in options and not layout.startswith("stream-k"):
        pytest.skip("ragged queries go by stream-K alone")
    case = make_case("cpu", torch.bfloat16, **options)
    full = emulate(case, rows, LAYOUTS[layout])
    inputs = paginate(case, 24) if rows == 16 else case  # as the kernels are that are compiled here
    masked = emulate(inputs, rows, LAYOUTS[layout], features="masked")
    hold(masked, case)
    for one, other in zip(masked, full):
        assert_same_bits(one, other)


@pytest.mark.parametrize("page_size", [8, 24, 64, 256])
@pytest.mark.parametrize("layout", ["stream-k-3", "whole-items", "clusters-of-5"])
def test_a_lean_kernel_of_pages(layout, page_size, emulate):
    case = make_case("cpu", torch.float16, lengths=(700, 5, 0, 1500), dims=(128, 128))
    paged = paginate(case, page_size)
    lean = emulate(paged, 8, LAYOUTS[layout], features="lean")
    for one, other in zip(lean, emulate(case, 8, LAYOUTS[layout])):
        assert_same_bits(one, other)


@pytest.mark.parametrize("features", ["all", "lean"])
@pytest.mark.parametrize("layout", ["stream-k-13", "whole-items", "three-items"])
@pytest.mark.parametrize("batch", [33, 100, 256, 257, 700])
def test_many_sequences(batch, layout, features, emulate):
    """A lane of the producer has one, several, or they are for all threads to look through."""
    random = Random(batch)
    lengths = [random.choice([0, 1, 60, 128, 129, 300]) for _ in range(batch)]
    case = make_case("cpu", torch.float16, lengths=lengths, heads=(2, 1), dims=(64, 64))
    for slack in (0, 1 << 20):
        hold(emulate(case, 8, LAYOUTS[layout], features=features, slack_tiles=slack), case)


@pytest.mark.parametrize("tma", [True, False], ids=["tma", "cp_async"])
@pytest.mark.parametrize("units", [1, 3, 13])
def test_ragged_queries(units, tma, emulate):
    case = make_case("cpu", torch.float16, lengths=(640, 129, 77), query_lengths=(3, 0, 5))
    hold(emulate(case, 8, (units, 0, 1, 1), tma=tma), case)


@pytest.mark.parametrize("cluster_size", [1, 2])
def test_teams_fall_back_on_stream_k(cluster_size, emulate):
    """Lengths that differ: the device takes equal shares of the line."""
    case = make_case("cpu", torch.float16, lengths=(1500, 10, 300))
    layout = (12, 1, 2, cluster_size)
    results = [emulate(case, 8, layout, slack_tiles=slack) for slack in (0, 1 << 20)]
    for result in results:
        hold(result, case)
    stream_k = emulate(case, 8, (12, 0, 1, 1))
    assert_same_bits(results[0][0], stream_k[0])


@pytest.mark.parametrize("stages", [2, 3, 8])
def test_any_ring_and_any_order_give_the_same_bits(stages, emulate):
    case = make_case("cpu", torch.float16, lengths=(700, 300))
    expected = emulate(case, 8, (5, 0, 1, 1))
    for seed in range(3):
        out, lse = emulate(case, 8, (5, 0, 1, 1), stages=stages, seed=100 * seed)
        assert_same_bits(out, expected[0])
        assert_same_bits(lse, expected[1])


@pytest.mark.parametrize("layout", ["stream-k-13", "whole-items", "teams-of-3", "clusters-of-2"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages(page_size, layout, emulate):
    case = make_case("cpu", torch.float16, lengths=(300, 5, 0, 450))
    paged = paginate(case, page_size)
    for tma in {False, page_size % 8 == 0}:
        hold(emulate(paged, 8, LAYOUTS[layout], tma=tma), case)


@pytest.mark.parametrize("rows, wgmma", [(16, False), (16, True), (64, True)])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_latent_pages(page_size, rows, wgmma, emulate):
    case = make_case("cpu", torch.float16, lengths=(150, 5, 0, 77), **LATENT)
    paged = paginate(case, page_size, layout="values-in-keys")
    for tma in {False, page_size % 8 == 0}:
        hold(emulate(paged, rows, LAYOUTS["stream-k-3"], tma=tma, wgmma=wgmma), case)


@pytest.mark.parametrize(
    "group_size, rows, dim", [(1, 8, 64), (12, 16, 64), (3, 8, 256), (3, 16, 512)]
)
def test_batch_invariant_has_the_same_bits_in_every_layout(group_size, rows, dim, emulate):
    for options in (dict(lengths=None, batch=1, capacity=1100), dict(lengths=(900, 133))):
        case = make_case(
            "cpu", torch.float16, heads=(2 * group_size, 2), dims=(dim, dim), scale_q=2.0,
            batch_invariant=True, **options,
        )  # fmt: skip
        results = [
            emulate(case, rows, LAYOUTS[layout], tma=layout != "stream-k-3")
            for layout in ("stream-k-1", "stream-k-3", "stream-k-13", "whole-items", "teams-of-3")
        ]
        hold(results[0], case)
        for out, lse in results[1:]:
            assert_same_bits(out, results[0][0])
            assert_same_bits(lse, results[0][1])


@pytest.mark.parametrize("tma", [True, False], ids=["tma", "cp_async"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows, heads", [(8, (2, 2)), (8, (12, 4)), (16, (16, 2))])
def test_head_pairs(rows, heads, layout, tma, emulate):
    case = make_case("cpu", torch.float16, heads=heads, lengths=(300, 5, 0, 700))
    hold(emulate(case, rows, LAYOUTS[layout], tma=tma, head_pairs=True), case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_head_pairs_with_several_queries(dtype, emulate):
    for rows, heads, options in [
        (8, (4, 4), dict(lengths=(500, 3), seqlen_q=4, window_left=130)),
        (16, (4, 2), dict(lengths=None, batch=2, capacity=270, seqlen_q=3)),
        (8, (4, 2), dict(lengths=(640, 129, 77), query_lengths=(3, 0, 5))),
    ]:
        case = make_case("cpu", dtype, heads=heads, **options)
        hold(emulate(case, rows, LAYOUTS["stream-k-3"], head_pairs=True), case)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_head_pairs_in_pages(page_size, emulate):
    case = make_case("cpu", torch.float16, heads=(8, 4), lengths=(300, 5, 0, 450))
    paged = paginate(case, page_size)
    for tma in {False, page_size % 8 == 0}:
        hold(emulate(paged, 8, LAYOUTS["stream-k-3"], tma=tma, head_pairs=True), case)


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("head", [0, 1])
def test_nan_stays_with_its_head_of_a_pair(head, cache, special, emulate):
    for layout in ("stream-k-3", "clusters-of-2"):
        case = make_case("cpu", torch.float16, heads=(4, 2), lengths=(300, 130))
        case[cache][0, 290, head, 5] = special
        out, lse = emulate(case, 8, LAYOUTS[layout], head_pairs=True)
        hold((out, lse), case)
        is_hit = torch.zeros(lse.shape, dtype=torch.bool)
        is_hit[0, 0, 2 * head : 2 * head + 2] = True
        assert out[~is_hit].isfinite().all() and lse[~is_hit].isfinite().all()
        if special is torch.nan:  # a score of -inf is a number like any other
            assert (out.isnan().any(-1) == is_hit).all()


@pytest.mark.parametrize("rows, heads, dim", [(8, (4, 2), 64), (16, (6, 2), 128)])
def test_head_pairs_of_float8_have_a_scale_each(rows, heads, dim, emulate):
    for cache in FLOAT8.values():
        case = make_case("cpu", torch.bfloat16, heads=heads, dims=(dim, dim), lengths=(300, 5, 0),
                         cache_dtype=cache, scales="batch")  # fmt: skip
        hold(emulate(case, rows, LAYOUTS["stream-k-3"], head_pairs=True), case)


@pytest.mark.parametrize(
    "options",
    [
        dict(heads=(6, 3)),
        dict(heads=(18, 2)),
        dict(heads=(4, 2), seqlen_q=5),
        dict(heads=(4, 2), dims=(64, 56)),
        dict(heads=(4, 2), dims=(56, 56)),
        dict(heads=(4, 2), dims=(128, 128)),
        dict(heads=(4, 2), batch_invariant=True),
    ],
    ids=str,
)
def test_heads_that_are_no_pairs(options, emulate):
    case = make_case("cpu", torch.float16, **options)
    with pytest.raises(ValueError, match="no pairs"):
        emulate(case, 8, LAYOUTS["stream-k-3"], head_pairs=True)


def test_heads_apart_are_no_pairs(emulate):
    case = make_case("cpu", torch.float16, heads=(4, 2))
    for name in ("k_cache", "v_cache"):
        apart = {**case, name: case[name].transpose(1, 2).contiguous().transpose(1, 2)}
        with pytest.raises(ValueError, match="no pairs"):
            emulate(apart, 8, LAYOUTS["stream-k-3"], head_pairs=True)


FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("tma", [True, False], ids=["tma", "cp_async"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("cache", FLOAT8)
@pytest.mark.parametrize(
    "rows, heads, dims",
    [
        (8, (4, 2), (64, 128)),
        (8, (5, 1), (112, 16)),
        (32, (20, 1), (128, 96)),
        (16, (13, 1), (256, 144)),
        (16, (13, 1), (576, 512)),
    ],
)
def test_float8(rows, heads, dims, cache, dtype, tma, emulate):
    options = dict(heads=heads, dims=dims, cache_dtype=FLOAT8[cache], scales="batch")
    for layout, lengths in {"stream-k-3": (300, 5, 0), "clusters-of-2": None}.items():
        case = make_case("cpu", dtype, lengths=lengths, batch=3, capacity=310, **options)
        hold(emulate(case, rows, LAYOUTS[layout], tma=tma), case)


@pytest.mark.parametrize("cache", FLOAT8)
def test_float8_pages(cache, emulate):
    case = make_case("cpu", torch.bfloat16, lengths=(300, 5, 0, 450), cache_dtype=FLOAT8[cache])
    for page_size in PAGE_SIZES:
        paged = paginate(case, page_size)
        for tma in {False, page_size % 8 == 0}:
            hold(emulate(paged, 8, LAYOUTS["stream-k-13"], tma=tma), case)


@pytest.mark.parametrize("page_size", [None, 24])
def test_float8_rows_on_8_byte_boundaries(page_size, emulate):
    """Which bulk copies cannot take, and cp.async in halves."""
    case = make_case("cpu", torch.float16, cache_dtype=torch.float8_e4m3fn)
    call = dict(case) if page_size is None else paginate(case, page_size)
    for name in ("k_cache", "v_cache"):
        cache = call[name]
        wide = torch.zeros(*cache.shape[:3], cache.shape[3] + 24, dtype=torch.uint8)
        wide[..., 8:-16] = cache.view(torch.uint8)
        call[name] = wide[..., 8:-16].view(cache.dtype)
    hold(emulate(call, 8, LAYOUTS["stream-k-3"], tma=False), case)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e9, 1e30])
def test_float8_with_queries_beyond_fp16(size, emulate):
    """bf16 reaches further than fp16, of which the products are."""
    case = make_case("cpu", torch.bfloat16, heads=(6, 2), cache_dtype=torch.float8_e4m3fn)
    case["q"] *= size * torch.logspace(-3, 0, 6)[:, None]
    if size > 1:
        case["k_scale"] = torch.full((3, 2), 1 / size)
    case["q"][1, 0, 3] = 0
    hold(emulate(case, 8, LAYOUTS["stream-k-3"]), case)


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_float8_with_nan_in_queries(special, emulate):
    case = make_case("cpu", torch.bfloat16, heads=(6, 2), cache_dtype=torch.float8_e4m3fn)
    case["q"][1, 0, 4, 7] = special
    out, lse = emulate(case, 8, LAYOUTS["stream-k-3"])
    is_hit = torch.zeros(lse.shape, dtype=torch.bool)
    is_hit[1, 0, 4] = True
    assert (lse.isnan() == is_hit).all() and (out.isnan().all(-1) == is_hit).all()
    assert (out.isnan().any(-1) == is_hit).all()


@pytest.mark.parametrize("cache", FLOAT8)
@pytest.mark.parametrize("units", [1, 3])
def test_float8_nan_shows_only_where_it_is_seen(units, cache, emulate):
    options = dict(heads=(2, 2), dims=(64, 64), seqlen_q=3, window_left=150)
    for lengths in [(300,), (1,), (257, 130)]:
        case = make_case("cpu", torch.float16, lengths=lengths, **options)
        for key in {lengths[0] - 1, max(lengths[0] - 2, 0), max(lengths[0] - 2 - 150, 0)}:
            case["v_cache"][0, key, -1, key % 64] = torch.nan
            case["v_cache"][0, key, -1, 3] = torch.inf
        case.update({name: case[name].to(FLOAT8[cache]) for name in ("k_cache", "v_cache")})
        hold(emulate(case, 8, (units, 0, 1, 1)), case)


@pytest.mark.parametrize("cache", FLOAT8)
def test_float8_batch_invariant(cache, emulate):
    case = make_case(
        "cpu", torch.bfloat16, heads=(6, 2), lengths=(900, 133), cache_dtype=FLOAT8[cache],
        scales="batch", batch_invariant=True,
    )  # fmt: skip
    results = [
        emulate(case, 8, LAYOUTS[layout], tma=layout != "stream-k-3")
        for layout in ("stream-k-1", "stream-k-3", "stream-k-13", "whole-items", "teams-of-3")
    ]
    hold(results[0], case)
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0])
        assert_same_bits(lse, results[0][1])


@pytest.mark.parametrize("arch", [800, 900])
@pytest.mark.parametrize("cache", FLOAT8)
def test_float8_is_widened_to_the_bit(cache, arch, load_emulated):
    """Every number of both formats, as sm_80 and as sm_90 do it."""
    options = ["-ULEANATTN_EMULATED_ARCH", f"-DLEANATTN_EMULATED_ARCH={arch}"]
    module = load_emulated("emulated_float8", *options)
    numbers = torch.arange(256, dtype=torch.uint8)
    got = torch.from_numpy(module.widen(numbers.numpy(), cache == "e5m2")).view(torch.float16)
    expected = numbers.view(FLOAT8[cache]).to(torch.float16)
    assert (got.isnan() == expected.isnan()).all()
    assert torch.equal(got.nan_to_num(0.5).view(torch.int16),
                       expected.nan_to_num(0.5).view(torch.int16))  # fmt: skip


def random_call(seed):
    """(case, call, rows, layout, other arguments): any shape, length, layout, loader and ring."""
    random = Random(seed)
    rows, wgmma, dims = random.choice(
        [
            (8, False, (64, 64)),
            (8, False, (40, 16)),
            (16, False, (64, 64)),
            (8, False, (136, 256)),
            (32, False, (72, 128)),
            (32, True, (128, 72)),
            (64, True, (40, 64)),
            (128, True, (64, 24)),
            (64, True, (256, 136)),
            (16, False, (576, 512)),
            (64, True, (576, 512)),
        ]
    )
    heads_kv, group_size = random.choice([1, 2, 3]), random.choice([1, 2, 3, 7, 8, 12, 20])
    if wgmma:
        group_size = random.choice([5, 20, 33, 50])
    batch = random.choice([1, 1, 2, 3, 6])
    options = dict(heads=(group_size * heads_kv, heads_kv), dims=dims, seed=seed, seqlen_q=1)
    options["values_in_keys"] = dims == (576, 512) and random.random() < 0.7
    ragged_queries = random.random() < 0.15
    if ragged_queries:
        options["query_lengths"] = tuple(random.choice([1, 0, 2, 5]) for _ in range(batch - 1))
        options["query_lengths"] += (2,)
    else:
        options["seqlen_q"] = random.choice([1, 1, 1, 2, 5, 9])
    lengths = tuple(random.choice([0, 1, 5, 64, 127, 128, 129, 300, 512]) for _ in range(batch))
    if not ragged_queries and random.random() < 0.25:
        options.update(lengths=None, batch=batch, capacity=random.choice([1, 128, 300, 640]))
    else:
        options["lengths"] = lengths
    if random.random() < 0.3:
        options["window_left"] = random.choice([0, 1, 50, 200])
    case = make_case("cpu", torch.float16, **options)
    call = dict(case)
    page_size = random.choice([1, 3, 8, 24, 64, 128, 256])
    if options["lengths"] and max(lengths) > 0 and random.random() < 0.4:
        layout = "values-in-keys" if options["values_in_keys"] else "plain"
        call = paginate(case, page_size, layout=layout)
    call["batch_invariant"] = rows <= 16 and random.random() < 0.3
    few_rows = group_size * options["seqlen_q"] <= 8 and not wgmma
    may_pair = dims == (64, 64) and heads_kv == 2 and few_rows and not call["batch_invariant"]
    kinds = ["stream-k"] if ragged_queries else ["stream-k", "whole", "teams", "clusters"]
    kind = random.choice(kinds[:3] if call["batch_invariant"] else kinds)
    if kind == "stream-k":
        layout = (random.choice([1, 2, 3, 5, 8, 17]), 0, 1, 1)
    elif kind == "whole":
        layout = (None, random.choice([1, 2, 3, 5]), 1, 1)
    else:
        size, num_clusters = random.choice([2, 3, 4]), random.choice([1, 1, 2, 3])
        layout = (None, 1, size * num_clusters, size if kind == "clusters" else 1)
    more = dict(
        tma=("block_table" not in call or page_size % 8 == 0) and random.random() < 0.6,
        stages=random.choice([2, 3, 5]) if max(dims) <= 64 else 3,
        slack_tiles=random.choice([0, 1 << 20]),
        wgmma=wgmma,
        head_pairs=may_pair and random.random() < 0.7,
        seed=seed,
    )
    return case, call, rows, layout, more


@pytest.mark.parametrize("seed", range(80))
def test_random_calls(seed, emulate):
    case, call, rows, layout, more = random_call(seed)
    hold(emulate(call, rows, layout, **more), case)
