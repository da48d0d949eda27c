"""flash_attn_with_kvcache means what FlashAttention's function means, argument by argument."""

import inspect
import math

import pytest
import torch
from append_cases import rotated
from cases import int32, sharp_dtype
from reference import assert_close, assert_same_bits

import leanattn
from leanattn.flash_attn import flash_attn_with_kvcache

FLASH_ATTN = [
    "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens",
    "cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale", "causal", "window_size",
    "softcap", "rotary_interleaved", "alibi_slopes", "num_splits", "return_softmax_lse",
]  # fmt: skip
DEFAULTS = {
    "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True,
    "num_splits": 0, "return_softmax_lse": False,
}  # fmt: skip


def make_call(
    device, dtype, *, batch=3, cache_batch=None, seqlen_q=2, seqlen_new=2, heads=(4, 2), dim=64,
    capacity=80, lengths=(5, 0, 33), rotary_dim=None, page_size=None, seed=1, **options,
):  # fmt: skip
    """Caches hold numbers up to each length and NaN from there on."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    heads_q, heads_kv = heads
    call = dict(q=normal(batch, seqlen_q, heads_q, dim), **options)
    rows = (cache_batch or batch, capacity)
    if page_size is not None:
        pages = -(-capacity // page_size)
        rows = (batch * pages + 3, page_size)
        order = torch.randperm(batch * pages, generator=generator, device=device)
        call["block_table"] = order.view(batch, pages).int()
    for name in ("k_cache", "v_cache"):
        call[name] = normal(*rows, heads_kv, dim)
    if seqlen_new is not None:
        call["k"], call["v"] = (normal(batch, seqlen_new, heads_kv, dim) for _ in range(2))
    call["cache_seqlens"] = int32(lengths[:batch], device)
    if rotary_dim is not None:
        angles = torch.rand(capacity + 8, rotary_dim // 2, generator=generator, device=device) * 6
        call["rotary_cos"], call["rotary_sin"] = angles.cos().to(dtype), angles.sin().to(dtype)
    return call


def one_sequence(call, b):
    """(q rotated, K, V) of sequence b in fp64, gathered one token after another; FlashAttention's
    documented meaning, with slices and loops."""
    q, k_cache, v_cache = call["q"], call["k_cache"], call["v_cache"]
    causal, window = call.get("causal", False), call.get("window_size", (-1, -1))
    interleaved = call.get("rotary_interleaved", True)
    cos, sin = call.get("rotary_cos"), call.get("rotary_sin")
    table = call.get("block_table", call.get("page_table"))
    row = b if call.get("cache_batch_idx") is None else int(call["cache_batch_idx"][b])
    leftpad = 0 if call.get("cache_leftpad") is None else int(call["cache_leftpad"][b])
    lengths = call.get("cache_seqlens")
    if lengths is None:
        length = k_cache.shape[1]
    else:
        length = lengths if isinstance(lengths, int) else int(lengths[b])
    keys, values = [], []
    for j in range(leftpad, length):
        place = (row, j)
        if table is not None:
            place = (int(table[b, j // k_cache.shape[1]]), j % k_cache.shape[1])
        keys.append(k_cache[place].double())
        values.append(v_cache[place].double())
    if call.get("k") is not None:
        for i in range(call["k"].shape[1]):
            key = call["k"][b, i].double()
            if cos is not None:
                key = rotated(key, cos[length + i], sin[length + i], interleaved)
                key = key.to(k_cache.dtype).double()
            keys.append(key)
            values.append(call["v"][b, i].double())
    rows = q[b].double()
    if cos is not None:
        ordered = causal or window != (-1, -1)
        at = [length + (i if ordered else 0) for i in range(q.shape[1])]
        rows = [rotated(x, cos[p], sin[p], interleaved) for x, p in zip(rows, at)]
        rows = torch.stack(rows).to(q.dtype).double()
    shape = (0, *k_cache.shape[2:])
    empty = torch.zeros(shape, dtype=torch.float64, device=q.device)
    return rows, torch.stack(keys) if keys else empty, torch.stack(values) if values else empty


def check(call):
    """Run the function and hold every sequence against fp64; then the caches themselves."""
    before = {name: x.clone() for name, x in call.items() if isinstance(x, torch.Tensor)}
    sequences = [one_sequence(call, b) for b in range(len(call["q"]))]
    result = flash_attn_with_kvcache(**call, return_softmax_lse=True)
    out, lse = result
    window = call.get("window_size", (-1, -1))
    causal = call.get("causal", False)
    options = dict(
        causal=causal, window_left=max(window[0], -1),
        window_right=-1 if causal else max(window[1], -1),
        softcap=call.get("softcap", 0.0), softmax_scale=call.get("softmax_scale"),
        sinks=call["s_aux"].float() if "s_aux" in call else None,
    )  # fmt: skip
    dtype = call["q"].dtype
    assert out.shape == call["q"].shape and out.dtype == dtype
    assert lse.shape == (*call["q"].shape[:1], call["q"].shape[2], call["q"].shape[1])
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    for b, (q, k, v) in enumerate(sequences):
        slopes = call.get("alibi_slopes")
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        # A number that was rotated may be one spacing off: compare with what the op computed with.
        assert_close(out[b : b + 1], lse[b : b + 1].transpose(1, 2), q=q.to(dtype)[None],
                     k_cache=k.to(dtype)[None], v_cache=v.to(dtype)[None], alibi_slopes=slopes,
                     **options)  # fmt: skip
    for name in set(before) - {"k_cache", "v_cache"}:
        assert_same_bits(call[name], before[name])
    if call.get("k") is None:
        assert_same_bits(call["k_cache"], before["k_cache"])
        assert_same_bits(call["v_cache"], before["v_cache"])
    return out, lse


CASES = {
    "one-query": dict(seqlen_q=1, seqlen_new=1),
    "no-new-tokens": dict(seqlen_new=None, lengths=(5, 2, 33)),
    "several": dict(),
    "causal": dict(causal=True),
    "causal-more-queries-than-tokens": dict(seqlen_new=None, causal=True, seqlen_q=9),
    "window": dict(window_size=(10, 0)),
    "window-both-sides": dict(window_size=(10, 1), seqlen_q=4, seqlen_new=4),
    "window-causal": dict(window_size=(7, 3), causal=True),
    "window-right-only": dict(window_size=(-1, 0), seqlen_q=3, seqlen_new=3),
    "fewer-new-than-queries": dict(causal=True, seqlen_q=5, seqlen_new=2),
    "softcap": dict(softcap=3.0, causal=True),
    "scale": dict(softmax_scale=0.3),
    "splits": dict(num_splits=7),
    "mha": dict(heads=(2, 2), causal=True),
}
ROPES = {
    "no-rope": {},
    "gptj": dict(rotary_dim=64),
    "neox": dict(rotary_dim=64, rotary_interleaved=False),
    "partial": dict(rotary_dim=32, rotary_interleaved=False),
}


def test_signature():
    """Positions, names and defaults are FlashAttention's; what is added is by keyword only."""
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == FLASH_ATTN
    for p in positional[3:]:
        assert p.default == DEFAULTS.get(p.name)
    assert leanattn.flash_attn_with_kvcache is flash_attn_with_kvcache


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", CASES)
def test_contiguous(name, rope, device):
    options = {**CASES[name], **ROPES[rope]}
    if options.get("seqlen_new", 2) is None and rope != "no-rope":
        pytest.skip("rotation is for new tokens")
    check(make_call(device, sharp_dtype(device), **options))


@pytest.mark.parametrize("page_size", [1, 16, 24])
@pytest.mark.parametrize("rope", ["no-rope", "gptj"])
@pytest.mark.parametrize("name", CASES)
def test_paged(name, rope, page_size, device):
    options = {**CASES[name], **ROPES[rope], "page_size": page_size}
    if options.get("seqlen_new", 2) is None and rope != "no-rope":
        pytest.skip("rotation is for new tokens")
    check(make_call(device, sharp_dtype(device), **options))


def test_page_table_is_block_table(device):
    """FlashAttention-3's name."""
    call = make_call(device, sharp_dtype(device), page_size=16, causal=True)
    call["page_table"] = call.pop("block_table")
    check(call)


@pytest.mark.parametrize("shape", ["heads", "batch"])
def test_alibi(shape, device):
    call = make_call(device, sharp_dtype(device), causal=True)
    size = (4,) if shape == "heads" else (3, 4)
    call["alibi_slopes"] = torch.rand(size, device=device)
    check(call)


@pytest.mark.parametrize("dtype_of_sinks", [torch.float32, torch.bfloat16])
def test_sinks(dtype_of_sinks, device):
    call = make_call(device, sharp_dtype(device), causal=True)
    call["s_aux"] = torch.randn(4, device=device).to(dtype_of_sinks)
    check(call)


@pytest.mark.parametrize("length", [0, 7, 78])
def test_length_as_a_number(length, device):
    call = make_call(device, sharp_dtype(device), rotary_dim=64)
    check({**call, "cache_seqlens": length})


def test_without_lengths(device):
    """All of the cache."""
    call = make_call(device, sharp_dtype(device), seqlen_new=None)
    check({**call, "cache_seqlens": None})


def test_the_caches_are_updated_and_the_rest_of_them_left(device):
    """After the call they hold the rotated keys; the next call goes on from there."""
    call = make_call(device, sharp_dtype(device), rotary_dim=64, causal=True)
    before = {name: call[name].clone() for name in ("k_cache", "v_cache")}
    check(call)
    for b, length in enumerate((5, 0, 33)):
        for name, new in (("k_cache", "k"), ("v_cache", "v")):
            cache = call[name][b]
            assert_same_bits(cache[:length], before[name][b, :length])
            assert_same_bits(cache[length + 2 :], before[name][b, length + 2 :])
        assert_same_bits(call["v_cache"][b, length : length + 2], call["v"][b])
    following = {**call, "cache_seqlens": call["cache_seqlens"] + 2}
    following["k"], following["v"] = call["v"].clone(), call["k"].clone()
    check(following)


def test_unused_cache_may_hold_nan(device):
    call = make_call(device, sharp_dtype(device), rotary_dim=64, causal=True)
    for b, length in enumerate((5, 0, 33)):
        call["k_cache"][b, length:] = call["v_cache"][b, length:] = math.nan
    check(call)


def test_more_rows_in_the_cache_than_sequences(device):
    call = make_call(device, sharp_dtype(device), cache_batch=5, causal=True)
    before = call["k_cache"].clone()
    check(call)
    assert_same_bits(call["k_cache"][3:], before[3:])


@pytest.mark.parametrize("seqlen_new", [None, 2])
def test_cache_batch_idx(seqlen_new, device):
    """Rows of the caches by number, without a copy of them."""
    call = make_call(device, sharp_dtype(device), cache_batch=6, seqlen_new=seqlen_new, causal=True)
    call["cache_batch_idx"] = int32((4, 0, 2), device)
    before = call["k_cache"].clone()
    check(call)
    assert_same_bits(call["k_cache"][[1, 3, 5]], before[[1, 3, 5]])


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(causal=True, rotary_dim=64), dict(seqlen_new=None), dict(window_size=(4, 0))],
)
def test_cache_leftpad(options, indexed, device):
    call = make_call(device, sharp_dtype(device), cache_batch=5, lengths=(5, 9, 33), **options)
    call["cache_leftpad"] = int32((2, 9, 17), device)
    if indexed:
        call["cache_batch_idx"] = int32((4, 1, 0), device)
    for b, begin in enumerate((2, 9, 17)):
        row = int(call["cache_batch_idx"][b]) if indexed else b
        call["k_cache"][row, :begin] = call["v_cache"][row, :begin] = math.nan
    check(call)


def sliced(cache):
    """From the middle of a longer cache."""
    batch, tokens, heads, dim = cache.shape
    return cache.new_zeros(batch, tokens + 12, heads, dim)[:, 4 : 4 + tokens]


def heads_first(cache):
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def tokens_first(cache):
    return cache.transpose(0, 1).contiguous().transpose(0, 1)


def padded_rows(cache):
    """Sequences that begin at no multiple of a token."""
    size = cache[0].numel()
    return cache.new_zeros(len(cache), size + 8)[:, :size].view(cache.shape)


@pytest.mark.parametrize("place", [sliced, heads_first, tokens_first, padded_rows])
def test_cache_leftpad_in_any_strides(place, device):
    call = make_call(device, sharp_dtype(device), lengths=(5, 9, 33))
    call["cache_leftpad"] = int32((2, 9, 17), device)
    for name in ("k_cache", "v_cache"):
        call[name] = place(call[name]).copy_(call[name])
    check(call)


def test_cache_leftpad_where_k_and_v_are_not_alike(device):
    """No table of tokens is right for both."""
    call = make_call(device, sharp_dtype(device))
    call["cache_leftpad"] = int32((0, 0, 0), device)
    call["k_cache"] = heads_first(call["k_cache"])
    before = call["k_cache"].clone()
    with pytest.raises(NotImplementedError, match="cache_leftpad"):
        flash_attn_with_kvcache(**call)
    assert_same_bits(call["k_cache"], before)


@pytest.mark.parametrize("wrong", [-1, -(2**31), 2**31 - 1])
def test_wrong_cache_leftpad_is_clamped(wrong, device):
    """No key beyond the length comes into sight."""
    call = make_call(device, sharp_dtype(device), lengths=(5, 0, 33), seqlen_new=None)
    for b, length in enumerate((5, 0, 33)):
        call["k_cache"][b, length:] = call["v_cache"][b, length:] = math.nan
    right = 0 if wrong < 0 else call["k_cache"].shape[1]
    results = []
    for begin in (wrong, right):
        call["cache_leftpad"] = int32([begin] * 3, device)
        results.append(flash_attn_with_kvcache(**call))
    assert_same_bits(*results)
    assert not results[0].isnan().any()


@pytest.mark.parametrize(
    "name, change",
    [
        ("q", lambda call: dict(q=call["q"][:, 0])),
        ("v", lambda call: dict(v=None)),
        ("k", lambda call: dict(k=None)),
        ("k", lambda call: dict(k=call["k"][:, 0])),
        ("cache_seqlens", lambda call: dict(cache_seqlens=None)),
        ("rotary_sin", lambda call: dict(rotary_cos=torch.ones(80, 8))),
        ("rotary_cos", lambda call: dict(rotary_sin=torch.ones(80, 8))),
        ("rotary_cos", lambda call: dict(k=None, v=None, rotary_cos=torch.ones(80, 8),
                                         rotary_sin=torch.ones(80, 8))),
        ("q", lambda call: dict(q=None)),
        ("k_cache", lambda call: dict(k_cache=None)),
        ("window_size", lambda call: dict(window_size=(1,))),
        ("window_size", lambda call: dict(window_size=3)),
        ("cache_seqlens", lambda call: dict(cache_seqlens=2**40)),
        ("cache_leftpad", lambda call: dict(cache_leftpad=1)),
        ("cache_batch_idx", lambda call: dict(cache_batch_idx=[0, 1, 2])),
        ("cache_leftpad", lambda call: dict(cache_leftpad=torch.zeros(3, device="meta").int())),
        ("rotary_cos", lambda call: dict(rotary_cos=torch.ones(80, 800),
                                         rotary_sin=torch.ones(80, 800))),
        ("rotary_sin", lambda call: dict(rotary_cos=torch.ones(80, 8),
                                         rotary_sin=torch.ones(80, 4))),
        ("rotary_cos", lambda call: dict(rotary_cos=torch.ones(80, 8).double(),
                                         rotary_sin=torch.ones(80, 8).double())),
        ("cache_batch_idx", lambda call: dict(cache_batch_idx=torch.zeros(3))),
        ("cache_batch_idx", lambda call: dict(cache_batch_idx=torch.zeros(2).int())),
        ("cache_leftpad", lambda call: dict(cache_leftpad=torch.zeros(3).long())),
        ("cache_batch_idx", lambda call: dict(cache_batch_idx=torch.zeros(3).int(),
                                              block_table=torch.zeros(3, 1).int())),
        ("cache_leftpad", lambda call: dict(cache_leftpad=torch.zeros(3).int(),
                                            block_table=torch.zeros(3, 1).int())),
        ("page_table", lambda call: dict(page_table=torch.zeros(3, 1).int(),
                                         block_table=torch.zeros(3, 1).int())),
    ],
)  # fmt: skip
def test_arguments_that_do_not_go_together(name, change):
    call = make_call("cpu", torch.float32)
    before = call["k_cache"].clone()
    with pytest.raises(ValueError, match=f"flash_attn_with_kvcache: {name} "):
        flash_attn_with_kvcache(**{**call, **change(call)})
    assert_same_bits(call["k_cache"], before)


@pytest.mark.parametrize(
    "message, change",
    [
        ("append_decode: k must", lambda call: dict(k=call["k"][..., :32])),
        ("softcap", lambda call: dict(softcap=-1.0)),
        ("head", lambda call: dict(q=call["q"][..., :3, :])),
        ("alibi_slopes", lambda call: dict(alibi_slopes=torch.ones(9))),
        ("sinks", lambda call: dict(s_aux=torch.ones(9))),
        ("softcap", lambda call: dict(softcap=-1.0, rotary_cos=torch.ones(90, 8),
                                      rotary_sin=torch.ones(90, 8))),
        ("softcap", lambda call: dict(softcap=-1.0, cache_leftpad=torch.zeros(3).int())),
    ],
)  # fmt: skip
def test_errors_of_the_ops_come_through(message, change):
    """Before the caches are touched, whichever op would refuse."""
    call = make_call("cpu", torch.float32)
    before = call["k_cache"].clone(), call["v_cache"].clone()
    with pytest.raises(RuntimeError, match=message):
        flash_attn_with_kvcache(**{**call, **change(call)})
    assert_same_bits(call["k_cache"], before[0])
    assert_same_bits(call["v_cache"], before[1])


def test_compile(device):
    """One whole graph, the caches updated in place."""
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    call = make_call(device, sharp_dtype(device), rotary_dim=32, causal=True)
    eager = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    wanted = flash_attn_with_kvcache(**eager, return_softmax_lse=True)
    for actual, expected in zip(compiled(**call, return_softmax_lse=True), wanted):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(call[name], eager[name], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_in_a_graph_without_a_sync(device):
    """Step after step, the lengths counted on by the graph itself."""
    call = make_call(device, torch.bfloat16, rotary_dim=64, causal=True, seqlen_q=1, seqlen_new=1)
    eager = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    leanattn.warmup(device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_with_kvcache(**call)
        call["cache_seqlens"] += 1
    for _ in range(9):
        graph.replay()
        torch.cuda.set_sync_debug_mode("error")
        try:
            wanted = flash_attn_with_kvcache(**eager)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same_bits(out, wanted)
        eager["cache_seqlens"] += 1
    assert_same_bits(call["k_cache"], eager["k_cache"])


@pytest.mark.parametrize("name", ["cache_leftpad", "cache_batch_idx"])
def test_empty_caches_whose_rows_are_chosen(name, device):
    q = torch.randn(2, 1, 4, 64, device=device).half()
    cache = torch.empty(3, 0, 2, 64, device=device).half()
    out = flash_attn_with_kvcache(q, cache, cache, **{name: int32([0, 1], device)})
    assert (out == 0).all() and out.shape == q.shape


def test_caches_of_three_dimensions(device):
    q = torch.randn(1, 1, 4, 64, device=device).half()
    cache = torch.randn(20, 2, 64, device=device).half()
    with pytest.raises(ValueError, match=r"k_cache must be .* got shape \[20, 2, 64\]"):
        flash_attn_with_kvcache(q, cache, cache, cache_leftpad=int32([0], device))


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("cache_leftpad", [-1, 0], r"cache_leftpad \[0\] must be from 0 to 5, got -1"),
        ("cache_leftpad", [5, 8], r"cache_leftpad \[1\] must be from 0 to 7, got 8"),
        ("cache_batch_idx", [0, 3], r"cache_batch_idx \[1\] must be from 0 to 2, got 3"),
    ],
)
def test_rows_that_would_be_clamped(name, values, message, device, monkeypatch):
    """LEANATTN_CHECK=1 finds the caller's bug, by the caller's names."""
    q, k = (torch.randn(2, 1, heads, 64, device=device).half() for heads in (4, 2))
    cache = torch.randn(3, 40, 2, 64, device=device).half()
    lengths = int32([4, 6], device)

    def call(values):
        rows = {name: int32(values, device)}
        flash_attn_with_kvcache(q, cache, cache.clone(), k, k, cache_seqlens=lengths, **rows)

    call(values)
    monkeypatch.setenv("LEANATTN_CHECK", "1")
    call([2, 1])
    before = cache.clone()
    with pytest.raises(ValueError, match=message):
        call(values)
    assert torch.equal(cache, before)
