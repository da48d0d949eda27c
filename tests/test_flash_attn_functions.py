"""FlashAttention's other functions, and its third version's arguments: meaning, ways, errors. The
calls of flash_attn_cases.py, 2000 of them, passed on a CPU and on a GPU; some run here."""

import inspect
import math

import pytest
import torch
from cases import int32, sharp_dtype
from flash_attn_cases import Call, assert_near, attend
from reference import assert_same_bits

import leanattn
from leanattn import flash_attn, flash_attn_interface
from leanattn.flash_attn import by_torch

OPTIONS = [
    "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes",
    "deterministic", "return_attn_probs",
]  # fmt: skip
OFFSETS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES = {
    "flash_attn_func": ["q", "k", "v", *OPTIONS],
    "flash_attn_kvpacked_func": ["q", "kv", *OPTIONS],
    "flash_attn_qkvpacked_func": ["qkv", *OPTIONS],
    "flash_attn_varlen_func": ["q", "k", "v", *OFFSETS, *OPTIONS, "block_table"],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *OFFSETS, *OPTIONS],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *OPTIONS],
}
DESCALES = ["q_descale", "k_descale", "v_descale"]
OPTIONS_3 = [
    "window_size", "attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic",
    "sm_margin", "return_attn_probs",
]  # fmt: skip
SIGNATURES_3 = {
    "flash_attn_func": ["q", "k", "v", "softmax_scale", "causal", "qv", *DESCALES, *OPTIONS_3],
    "flash_attn_varlen_func": [
        "q", "k", "v", *OFFSETS, "seqused_q", "seqused_k", "softmax_scale", "causal", "qv",
        *DESCALES, *OPTIONS_3,
    ],
    "flash_attn_with_kvcache": [
        "q", "k_cache", "v_cache", "k", "v", "qv", "rotary_cos", "rotary_sin", "cache_seqlens",
        "cache_batch_idx", "cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new",
        "max_seqlen_q", "rotary_seqlens", *DESCALES, "softmax_scale", "causal", "window_size",
        "attention_chunk", "softcap", "rotary_interleaved", "scheduler_metadata", "num_splits",
        "pack_gqa", "sm_margin", "return_softmax_lse",
    ],
}  # fmt: skip
DEFAULTS = {
    "dropout_p": 0.0, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "deterministic": False, "return_attn_probs": False, "attention_chunk": 0, "sm_margin": 0,
    "rotary_interleaved": True, "return_softmax_lse": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "module, signatures", [(flash_attn, SIGNATURES), (flash_attn_interface, SIGNATURES_3)]
)
def test_signatures(module, signatures):
    """Positions, names and defaults are FlashAttention's."""
    for name, names in signatures.items():
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in positional] == names
        for p in positional:
            if p.default is not p.empty and p.name != "num_splits":
                assert p.default == DEFAULTS.get(p.name), (name, p)
        if module is flash_attn:
            assert getattr(leanattn, name) is getattr(module, name)


@pytest.mark.parametrize("backend", ["auto", "leanattn", "torch"])
@pytest.mark.not_emulated
def test_random_calls(backend, device, monkeypatch):
    """By each way, with other calls each."""
    monkeypatch.setenv("LEANATTN_BACKEND", backend)
    first = {"auto": 0, "leanattn": 200, "torch": 400}[backend]
    for index in range(first, first + (200 if device == "cuda" else 100)):
        try:
            Call(index, device).check()
        except ValueError as error:  # leanattn by name
            assert "cannot take this call: a tensor is empty" in str(error)


MASKS = {
    "none": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(5, 2)),
    "window-causal": dict(window_size=(5, 0), causal=True),
    "alibi": dict(alibi_slopes=[0.1, 0.2, 0.3, 0.4], causal=True),
    "softcap": dict(softcap=2.0, causal=True),
    "scale": dict(softmax_scale=0.3),
    "lse": dict(return_attn_probs=True, causal=True),
}
LENGTHS = {"dense": ([9, 9], [21, 21]), "more-queries": ([23, 23], [11, 11]),
           "varlen": ([9, 0, 23], [21, 4, 11])}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.not_emulated
def test_gradients(lengths, name, device):
    """Those of fp64."""
    dtype = sharp_dtype(device)
    lengths_q, lengths_k = LENGTHS[lengths]
    options = dict(MASKS[name])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor(options["alibi_slopes"], device=device)

    def leaf(total, heads):
        return torch.randn(total, heads, 32, device=device).to(dtype).requires_grad_()

    q, k, v = leaf(sum(lengths_q), 4), leaf(sum(lengths_k), 2), leaf(sum(lengths_k), 2)
    if lengths == "varlen":
        offsets = [int32([0, *torch.tensor(n).cumsum(0)], device) for n in (lengths_q, lengths_k)]
        result = leanattn.flash_attn_varlen_func(q, k, v, *offsets, 23, 21, **options)
    else:
        dense = (x.unflatten(0, (2, -1)) for x in (q, k, v))
        result = leanattn.flash_attn_func(*dense, **options)
    out = result[0] if "return_attn_probs" in options else result
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, (q, k, v), grad)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scale, slopes = options.get("softmax_scale"), options.get("alibi_slopes")
    masks = dict(causal=options.get("causal", False), window=options.get("window_size", (-1, -1)))
    outs = [
        attend(*rows, scale=scale, slopes=slopes, softcap=options.get("softcap", 0.0), **masks)[0]
        for rows in zip(
            wide[0].split(lengths_q), wide[1].split(lengths_k), wide[2].split(lengths_k)
        )
    ]
    expected_out = torch.cat(outs)
    assert_near(out.reshape(expected_out.shape), expected_out, dtype)
    expected = torch.autograd.grad(expected_out, wide, grad.reshape(expected_out.shape).double())
    for mine, right in zip(actual, expected):
        assert (mine.double() - right).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("options", [{}, dict(window_size=(5, 2)), dict(softcap=3.0)], ids=str)
@pytest.mark.parametrize("form", ["dense", "varlen"])
@pytest.mark.not_emulated
def test_dropout(form, options, device):
    """Weights are left out and the others raised, so that the mean stays; anew in each call."""
    q, k = torch.randn(2, 2, 64, 2, 32, device=device).to(sharp_dtype(device))
    v = torch.ones_like(k)

    def call():
        if form == "dense":
            return leanattn.flash_attn_func(q, k, v, 0.25, **options)
        offsets = int32([0, 64, 128], device)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return leanattn.flash_attn_varlen_func(*flat, offsets, offsets, 64, 64, 0.25, **options)

    outs = torch.stack([call().float() for _ in range(30)])
    assert abs(outs.mean().item() - 1) < 0.02
    assert outs.std(0).min() > 0.01 and not torch.equal(outs[0], outs[1])


def test_what_is_returned(device):
    """out; or out, lse and an empty third, which is FlashAttention's dropout mask."""
    qkv = torch.randn(2, 5, 3, 4, 32, device=device).to(sharp_dtype(device))
    out = leanattn.flash_attn_qkvpacked_func(qkv)
    again, lse, probabilities = leanattn.flash_attn_qkvpacked_func(qkv, return_attn_probs=True)
    assert out.shape == again.shape == (2, 5, 4, 32)
    assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32 and lse.is_contiguous()
    assert probabilities.shape == (0,)
    offsets = int32([0, 5, 10], device)
    _, lse, _ = leanattn.flash_attn_varlen_qkvpacked_func(
        qkv.flatten(0, 1), offsets, 5, return_attn_probs=True
    )
    assert lse.shape == (4, 10)
    q, k, v = qkv.unbind(2)
    assert len(flash_attn_interface.flash_attn_func(q, k, v, return_attn_probs=True)) == 2
    assert torch.equal(flash_attn_interface.flash_attn_func(q, k, v), out)


def test_rows_without_keys(device):
    """0 and -inf, causal from the bottom right."""
    q, k = torch.randn(2, 1, 7, 2, 32, device=device).to(sharp_dtype(device))
    out, lse, _ = leanattn.flash_attn_func(
        q, k[:, :3], k[:, :3], causal=True, return_attn_probs=True
    )
    assert (out[:, :4] == 0).all() and (lse[..., :4] == -math.inf).all()
    assert (out[:, 4:] != 0).all() and lse[..., 4:].isfinite().all()
    assert_near(out[0, 4:5].flatten(1), k[0, :1].double().flatten(1), q.dtype)  # key 0 alone


@pytest.mark.parametrize("shape", ["keys", "queries", "batch"])
def test_empty(shape, device):
    sizes = dict(batch=2, queries=3, keys=4) | {shape: 0}
    q = torch.randn(sizes["batch"], sizes["queries"], 4, 32, device=device).to(sharp_dtype(device))
    k = q.new_zeros(sizes["batch"], sizes["keys"], 2, 32)
    out, lse, _ = leanattn.flash_attn_func(q, k, k, return_attn_probs=True)
    assert out.shape == q.shape and (out == 0).all() and lse.shape == q.shape[:1] + (4, q.shape[1])


# --- The decision table --------------------------------------------------------------------------


def dense(queries, *, keys=40, **options):
    q = torch.randn(2, queries, 4, 32)
    return leanattn.flash_attn_func, (q, *torch.randn(2, 2, keys, 4, 32)), options


def varlen(queries, **options):
    q, offsets = torch.randn(queries, 4, 32), int32([0, queries], "cpu")
    arguments = (q, q, q, offsets, offsets, queries, queries)
    return leanattn.flash_attn_varlen_func, arguments, options


@pytest.mark.parametrize(
    "call, by",
    [
        (dense(1), by_torch.SDPA),
        (dense(40, causal=True), by_torch.SDPA),
        (dense(5, causal=True, dropout_p=0.5), by_torch.SDPA),
        (dense(5, window_size=(3, 0)), by_torch.SDPA_WITH_MASK),
        (dense(5, window_size=(50, 4)), by_torch.SDPA),  # hides nothing
        (dense(5, alibi_slopes=torch.rand(4)), by_torch.SDPA_WITH_MASK),
        (dense(5, softcap=1.0), by_torch.PLAIN),
        (dense(5, return_attn_probs=True), by_torch.PLAIN),
        (varlen(5), by_torch.BY_SEQUENCE),
    ],
)
def test_ways_on_a_cpu(call, by, monkeypatch):
    function, arguments, options = call
    route = leanattn.explain(function, *arguments, **options)
    assert (route.backend, route.by) == ("torch", by)
    monkeypatch.setenv("LEANATTN_BACKEND", "leanattn")
    if "dropout_p" in options:
        for use in (function, lambda *a, **o: leanattn.explain(function, *a, **o)):
            with pytest.raises(ValueError, match="cannot take this call: there is dropout"):
                use(*arguments, **options)
    else:
        route = leanattn.explain(function, *arguments, **options)
        assert route == leanattn.Route("leanattn", "LEANATTN_BACKEND is leanattn")


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_ways_on_a_gpu(device):
    """Decode shapes to the op, prefill to torch, and what torch lacks to the op again."""

    def ways(call):
        function, arguments, options = call
        options = {n: x.to(device) if hasattr(x, "to") else x for n, x in options.items()}
        moved = [
            x.to(device, torch.bfloat16 if x.is_floating_point() else None)
            if isinstance(x, torch.Tensor) else x
            for x in arguments
        ]  # fmt: skip
        route = leanattn.explain(function, *moved, **options)
        function(*moved, **options)
        return route.by or route.backend

    assert ways(dense(1)) == ways(dense(16, causal=True)) == ways(varlen(16)) == "leanattn"
    assert ways(dense(4, softcap=2.0)) == ways(dense(4, window_size=(3, 0))) == "leanattn"
    assert ways(dense(17)) == ways(dense(40, causal=True)) == by_torch.SDPA
    assert ways(dense(17, softcap=2.0)) == ways(varlen(17, softcap=2.0)) == "leanattn"
    assert ways(dense(17, alibi_slopes=torch.rand(4))) == "leanattn"
    assert ways(dense(1, dropout_p=0.1)) == by_torch.SDPA
    if by_torch._varlen_attn():
        assert ways(varlen(17)) == ways(dense(17, window_size=(3, 0))) == by_torch.VARLEN
        assert ways(dense(17, return_attn_probs=True)) == by_torch.VARLEN


def test_explain_of_other_functions():
    q = torch.randn(1, 1, 4, 32)
    assert leanattn.explain(leanattn.flash_attn_with_kvcache, q, q, q).backend == "leanattn"
    assert leanattn.explain(leanattn.scaled_dot_product_attention, q, q, q) == leanattn.explain(
        q, q, q
    )
    with pytest.raises(TypeError, match="function must be one of scaled_dot_product_attention"):
        leanattn.explain(torch.nn.functional.softmax, q)


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_short_queries_without_a_sync(device):
    """Dense, ragged and paged, whatever the options."""
    q, k = torch.randn(2, 2, 4, 4, 64, device=device).bfloat16()
    offsets, table = int32([0, 3, 8], device), int32([[0], [1]], device)
    slopes = torch.rand(4, device=device)

    def calls():
        leanattn.flash_attn_func(q, k, k, causal=True, softcap=2.0, return_attn_probs=True)
        ragged = (q.flatten(0, 1), offsets, offsets, 5, 5)
        options = dict(window_size=(2, 0), alibi_slopes=slopes)
        leanattn.flash_attn_varlen_func(ragged[0], *[k.flatten(0, 1)] * 2, *ragged[1:], **options)
        leanattn.flash_attn_varlen_func(ragged[0], k, k, *ragged[1:], block_table=table)

    calls()
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- Errors --------------------------------------------------------------------------------------

WRONG = {
    "q": [dict(q=torch.randn(2, 5, 32)), dict(q=None), dict(q=torch.randn(2, 5, 3, 32)),
          dict(q=torch.randn(2, 5, 4, 32).double())],
    "k": [dict(k=torch.randn(2, 9, 2, 16)), dict(k=torch.randn(1, 9, 2, 32)),
          dict(k=torch.randn(2, 9, 2, 32).half()), dict(k=torch.randn(2, 9, 2, 32, device="meta"))],
    "v": [dict(v=torch.randn(2, 8, 2, 32)), dict(v=torch.randn(2, 9, 1, 32))],
    "dropout_p": [dict(dropout_p=1.0), dict(dropout_p=-0.1), dict(dropout_p="no")],
    "softcap": [dict(softcap=-1.0), dict(softcap=math.nan)],
    "softmax_scale": [dict(softmax_scale=math.inf)],
    "window_size": [dict(window_size=3), dict(window_size=(1,)), dict(window_size=(1.5, 0))],
    "alibi_slopes": [dict(alibi_slopes=torch.rand(3)), dict(alibi_slopes=torch.rand(4).half())],
    "return_attn_probs": [dict(return_attn_probs=True, dropout_p=0.5)],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    """By their names, before anything is computed; explain says the same."""
    good = dict(q=torch.randn(2, 5, 4, 32), k=torch.randn(2, 9, 2, 32), v=torch.randn(2, 9, 2, 32))
    for change in WRONG[name]:
        for call in (
            leanattn.flash_attn_func,
            lambda **call: leanattn.explain(leanattn.flash_attn_func, **call),
        ):
            with pytest.raises((ValueError, NotImplementedError), match=f"_func: {name} "):
                call(**{**good, **change})


@pytest.mark.parametrize(
    "name, change",
    [
        ("q", dict(q=torch.randn(2, 5, 4, 32))),
        ("k", dict(k=torch.randn(9, 2, 16))),
        ("k", dict(block_table=int32([[0]], "cpu"))),
        ("cu_seqlens_q", dict(cu_seqlens_q=torch.tensor([0, 7]))),
        ("cu_seqlens_q", dict(cu_seqlens_q=int32([0, 8], "cpu"))),
        ("cu_seqlens_q", dict(cu_seqlens_q=int32([3, 2], "cpu"))),
        ("cu_seqlens_k", dict(cu_seqlens_k=int32([0, 4, 9], "cpu"))),
        ("cu_seqlens_k", dict(cu_seqlens_k=None)),
        ("max_seqlen_q", dict(max_seqlen_q=torch.tensor(7))),
        ("max_seqlen_k", dict(max_seqlen_k=-1)),
        ("seqused_k", dict(seqused_k=int32([9], "cpu"), dropout_p=0.1)),
        ("seqused_k", dict(seqused_k=int32([9, 9], "cpu"))),
    ],
)
def test_wrong_offsets(name, change):
    good = dict(
        q=torch.randn(7, 4, 32), k=torch.randn(9, 2, 32), v=torch.randn(9, 2, 32),
        cu_seqlens_q=int32([0, 7], "cpu"), cu_seqlens_k=int32([0, 9], "cpu"), max_seqlen_q=7,
        max_seqlen_k=9,
    )  # fmt: skip
    leanattn.flash_attn_varlen_func(**good)
    with pytest.raises((ValueError, NotImplementedError), match=f"_varlen_func: {name} "):
        leanattn.flash_attn_varlen_func(**{**good, **change})


def test_packed_tensors_of_other_shapes():
    q = torch.randn(2, 5, 4, 32)
    with pytest.raises(ValueError, match=r"kv must be \[B, S, 2, H, D\], got \[2, 5, 4, 32\]"):
        leanattn.flash_attn_kvpacked_func(q, q)
    with pytest.raises(ValueError, match=r"qkv must be \[total, 3, H, D\], got \[2, 5, 4, 32\]"):
        leanattn.flash_attn_varlen_qkvpacked_func(q, int32([0, 5], "cpu"), 5)


def test_pages_have_no_gradients():
    q, offsets = torch.randn(2, 4, 32, requires_grad=True), int32([0, 2], "cpu")
    pages, table = torch.randn(1, 16, 4, 32), int32([[0]], "cpu")
    call = (q, pages, pages, offsets, offsets, 2, 2)
    with pytest.raises(NotImplementedError, match="block_table is not supported with gradients"):
        leanattn.flash_attn_varlen_func(*call, block_table=table)
    with torch.no_grad():
        leanattn.flash_attn_varlen_func(*call, block_table=table)


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_deterministic_gradients_are_torchs(device):
    q = torch.randn(1, 20, 4, 64, device=device).half().requires_grad_()
    with pytest.raises(NotImplementedError, match="deterministic is not supported"):
        leanattn.flash_attn_func(q, q, q, deterministic=True)
    with torch.no_grad():
        leanattn.flash_attn_func(q, q, q, deterministic=True)


# --- FlashAttention-3 ----------------------------------------------------------------------------


def cache_call(device, dtype=torch.bfloat16, queries=1):
    pages = torch.randn(2, 6, 16, 2, 64, device=device).to(dtype)
    return dict(
        q=torch.randn(2, queries, 4, 64, device=device).to(dtype), k_cache=pages[0],
        v_cache=pages[1], cache_seqlens=int32([20, 33], device),
        page_table=int32([[3, 1, 0], [5, 2, 4]], device), causal=True,
    )  # fmt: skip


def test_hints_change_nothing(device):
    call = cache_call(device)
    out = flash_attn_interface.flash_attn_with_kvcache(**call)
    hints = dict(scheduler_metadata=torch.ones(3), pack_gqa=True, sm_margin=8, num_splits=3,
                 max_seqlen_q=1)  # fmt: skip
    assert_same_bits(flash_attn_interface.flash_attn_with_kvcache(**call, **hints), out)
    assert flash_attn_interface.get_scheduler_metadata(2, 1, 64, causal=True) is None


@pytest.mark.parametrize("name", ["qv", "q_descale", "rotary_seqlens", "attention_chunk"])
def test_what_cannot_be_had_is_refused_by_name(name):
    call = cache_call("cpu")
    given = 16 if name == "attention_chunk" else torch.ones(2, 2)
    for function in (
        leanattn.flash_attn_with_kvcache,
        flash_attn_interface.flash_attn_with_kvcache,
    ):
        with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
            function(**call, **{name: given})


@pytest.mark.parametrize("shape", [(2, 2), (2,), ()])
def test_descales(shape, device):
    """What float8 numbers are to be multiplied by; new tokens are divided by it."""
    call = cache_call(device)
    descales = {f"{n}_descale": torch.rand(shape, device=device) + 0.5 for n in "kv"}
    scales = {name.replace("descale", "scale"): x for name, x in descales.items()}
    caches = {n: call.pop(n).to(torch.float8_e4m3fn) for n in ("k_cache", "v_cache")}
    table, lengths = call.pop("page_table"), call.pop("cache_seqlens")
    k, v = torch.randn(2, 2, 1, 2, 64, device=device).bfloat16()
    expected_caches = [cache.clone() for cache in caches.values()]
    leanattn.append_kv(k, v, *expected_caches, lengths, table, **scales)
    expected = leanattn.decode(call["q"], *expected_caches, lengths + 1, table, **scales)
    out = leanattn.flash_attn_with_kvcache(
        **call, **caches, k=k, v=v, page_table=table, cache_seqlens=lengths, **descales
    )
    assert_same_bits(out, expected)
    for mine, right in zip(caches.values(), expected_caches):
        assert torch.equal(mine.view(torch.uint8), right.view(torch.uint8))


def test_ragged_queries_with_rotation(device):
    """As each sequence alone."""
    dtype = sharp_dtype(device)
    lengths, news = [20, 33], [3, 1]
    offsets = int32([0, 3, 4], device)
    cos, sin = torch.rand(2, 64, 16, device=device)
    call = cache_call(device, dtype)
    q, k, v = (torch.randn(4, h, 64, device=device).to(dtype) for h in (4, 2, 2))
    rotary = dict(rotary_cos=cos, rotary_sin=sin, causal=True)
    caches = [call["k_cache"].clone(), call["v_cache"].clone()]
    outs = []
    for b, (length, rows) in enumerate(zip(lengths, (slice(0, 3), slice(3, 4)))):
        outs.append(
            leanattn.flash_attn_with_kvcache(
                q[None, rows], *caches, k[None, rows], v[None, rows],
                block_table=call["page_table"][b : b + 1], cache_seqlens=length, **rotary,
            )[0]
        )  # fmt: skip
    call.update(q=q, k=k, v=v, cu_seqlens_q=offsets, cu_seqlens_k_new=offsets, **rotary)
    out, lse = leanattn.flash_attn_with_kvcache(**call, return_softmax_lse=True)
    torch.testing.assert_close(out, torch.cat(outs), rtol=1e-3, atol=1e-3)
    assert lse.shape == (4, 4)
    assert_same_bits(call["k_cache"], caches[0])
    assert sum(news) == len(q)
    for change in (dict(cu_seqlens_k_new=offsets.clone()), dict(causal=False)):
        with pytest.raises(NotImplementedError, match="rotary_cos is not supported with cu_seql"):
            leanattn.flash_attn_with_kvcache(**{**call, **change})


def test_seqused_k(device):
    """Fewer keys than cu_seqlens_k says, and pages without it."""
    q, k = (torch.randn(n, 2, 32, device=device).to(sharp_dtype(device)) for n in (3, 12))
    offsets, used = int32([0, 1, 3], device), int32([4, 5], device)
    out = leanattn.flash_attn_varlen_func(
        q, k, k, offsets, int32([0, 6, 12], device), 2, 6, seqused_k=used
    )
    expected = [attend(q[:1], k[:4], k[:4])[0], attend(q[1:], k[6:11], k[6:11])[0]]
    assert_near(out, torch.cat(expected), q.dtype)
    pages, table = k.view(6, 2, 2, 32), int32([[0, 1, 2], [3, 4, 5]], device)
    paged = leanattn.flash_attn_varlen_func(
        q, pages, pages, offsets, None, 2, 6, block_table=table, seqused_k=used
    )
    assert_near(paged, torch.cat(expected), q.dtype)


def test_combine(device):
    outs, lses = torch.randn(3, 2, 1, 4, 32, device=device), torch.randn(3, 2, 1, 4, device=device)
    for mine, right in zip(
        flash_attn_interface.flash_attn_combine(outs, lses), leanattn.merge_states(outs, lses)
    ):
        assert_same_bits(mine, right)


# --- Head dims -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [100, 20, 50])
@pytest.mark.parametrize("rotary", [False, True])
def test_caches_of_any_head_dim_are_not_copied(rotary, dim, device):
    """OpenLLaMA-3B has 100. The cache is read and written as it lies."""
    dtype = sharp_dtype(device)
    q, k, v = torch.randn(3, 2, 1, 4, dim, device=device).to(dtype)
    caches = torch.randn(2, 2, 40, 4, dim, device=device).to(dtype)
    lengths = [7, 30]
    options = {}
    if rotary:
        angles = torch.rand(64, 10, device=device)
        options = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin())
    out = leanattn.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=int32(lengths, device), causal=True, **options
    )
    if rotary:
        q = q.clone()
        scratch = caches.clone()
        leanattn.rope_append_kv(
            q, k, v, *scratch, int32(lengths, device), None, angles.cos(), angles.sin(),
            interleaved=True,
        )  # fmt: skip
    for b, length in enumerate(lengths):
        assert_same_bits(caches[1][b, length], v[b, 0])
        expected, _ = attend(q[b], *(cache[b, : length + 1] for cache in caches))
        assert_near(out[b], expected, dtype)


def test_compile(device):
    """One whole graph each."""
    qkv = torch.randn(2, 5, 3, 4, 32, device=device).to(sharp_dtype(device))
    offsets = int32([0, 5, 10], device)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend_twice(qkv):
        ragged = qkv.flatten(0, 1)
        out = leanattn.flash_attn_qkvpacked_func(qkv, causal=True)
        used = offsets.diff()
        q, k, v = ragged.unbind(1)
        more = leanattn.flash_attn_varlen_func(q, k, v, offsets, offsets, 5, 5, seqused_k=used)
        return out, more

    for actual, expected in zip(
        attend_twice(qkv),
        (
            leanattn.flash_attn_qkvpacked_func(qkv, causal=True),
            leanattn.flash_attn_qkvpacked_func(qkv).flatten(0, 1),
        ),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
