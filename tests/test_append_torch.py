"""append_kv and rope_append_kv as ops of torch: schemas, torch.compile, autograd, CUDA graphs."""

import pytest
import torch
from append_cases import CALLS, FP8, INT32_MAX, OPS, PAGINGS, bits, make_call, run
from cases import int32, launched, sharp_dtype

import leanattn

SCHEMAS = {
    "append_kv": "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor "
    "cache_seqlens, Tensor? block_table=None, *, Tensor? cu_seqlens=None, Tensor? k_scale=None, "
    "Tensor? v_scale=None, int cp_world_size=1, int cp_rank=0, int cp_interleave=1) -> ()",
    "rope_append_kv": "(Tensor(c!) q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor cache_seqlens, Tensor? block_table, Tensor cos, Tensor sin, *, bool interleaved=False, "
    "Tensor? cu_seqlens=None, Tensor? k_scale=None, Tensor? v_scale=None, int cp_world_size=1, "
    "int cp_rank=0, int cp_interleave=1) -> ()",
}


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema(op):
    expected_schema = torch._C.parse_schema(f"leanattn::{op}{SCHEMAS[op]}")
    assert str(getattr(OPS, op).default._schema) == str(expected_schema)


@pytest.mark.parametrize("name", ["plain", "one-token-3d", "ragged"])
@pytest.mark.parametrize("paging", ["contiguous", "pages-of-3"])
def test_opcheck(paging, name, device):
    """k_cache, v_cache and q change, and nothing else."""
    options = {**CALLS[name], **PAGINGS[paging]}
    call = make_call(device, torch.float16, **options)
    call["k_cache"].zero_()
    call["v_cache"].zero_()
    torch.library.opcheck(OPS.append_kv.default, (), call)
    call = {"block_table": None, **make_call(device, torch.float16, rotary_dim=64, **options)}
    call["k_cache"].zero_()
    call["v_cache"].zero_()
    torch.library.opcheck(OPS.rope_append_kv.default, (), call)


def attention_step(qkv, storage, cache_seqlens, cos, sin):
    """One layer's step, everything between the projections; K and V packed, or two caches."""
    q, k, v = (qkv * 2).split([4, 2, 2], dim=2)
    k_cache, v_cache = storage if isinstance(storage, tuple) else storage.split(64, -1)
    leanattn.rope_append_kv(q, k, v, k_cache, v_cache, cache_seqlens, None, cos, sin)
    out = leanattn.decode(q, k_cache, v_cache, cache_seqlens + q.shape[1])
    return out + 1, q * 3


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, packed, device):
    """Functionalized and put back in place, the caches being the graph's own inputs, also where K
    and V share their memory, and q a view of a buffer of inductor's."""
    if device == "cuda" and backend == "inductor":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    compiled = torch.compile(attention_step, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 3):
        dtype = sharp_dtype(device)
        call = make_call(device, dtype, batch=batch, rotary_dim=64)
        qkv = torch.randn(batch, 2, 8, 64, device=device).to(dtype)
        results = []
        for step_function in (attention_step, compiled):
            storage = torch.zeros(batch, 24, 2, 128, dtype=dtype, device=device)
            caches = storage if packed else tuple(x.clone() for x in storage.split(64, -1))
            rest = (call["cache_seqlens"], call["cos"], call["sin"])
            out = step_function(qkv, caches, *rest)
            results.append((*out, *(storage.split(64, -1) if packed else caches)))
        assert (results[0][2] != 0).any()
        for actual, wanted in zip(results[1], results[0]):
            torch.testing.assert_close(actual, wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_backward_says_what_to_use(argument, op, device):
    """What was written knows that there is no way back."""
    call = make_call(device, torch.float16, rotary_dim=None if op == "append_kv" else 64)
    if argument not in call:
        pytest.skip("append_kv has no q")
    leaf = call[argument].requires_grad_()
    call[argument] = leaf * 1
    run(call)
    for name in ("k_cache", "v_cache", "q"):
        if name in call:
            with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
                call[name].float().sum().backward()


@pytest.mark.parametrize("op", SCHEMAS)
def test_what_is_written_is_known_to_be(op, device):
    """Autograd must not use what it has saved of it."""
    call = make_call(device, torch.float16, rotary_dim=None if op == "append_kv" else 64)
    weight = torch.ones_like(call["k_cache"], requires_grad=True)
    loss = (weight * call["k_cache"]).sum()
    run(call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("argument", ["k_cache", "v_cache", "q"])
def test_a_leaf_is_refused_before_it_is_written(argument, op, device):
    """And nothing else is written either."""
    call = make_call(device, torch.float16, rotary_dim=None if op == "append_kv" else 64)
    if argument not in call:
        pytest.skip("append_kv has no q")
    call[argument].requires_grad_()
    before = {name: call[name].detach().clone() for name in ("k_cache", "v_cache")}
    with pytest.raises(RuntimeError, match=f"leanattn::{op}: {argument} cannot be written"):
        run(call)
    for name, tensor in before.items():
        assert torch.equal(call[name].detach().view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_autograd(guard, device):
    call = make_call(device, torch.float16, rotary_dim=64)
    call["k"].requires_grad_()
    with guard():
        run(call)
    assert not call["k_cache"].requires_grad


def test_same_bits_in_every_run(device):
    first = make_call(device, torch.bfloat16, rotary_dim=64, seqlen_new=9)
    run(first)
    for _ in range(5):
        again = make_call(device, torch.bfloat16, rotary_dim=64, seqlen_new=9)
        run(again)
        for name in ("q", "k_cache", "v_cache"):
            assert torch.equal(bits(again[name]), bits(first[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "ragged"])
def test_graph_replay_without_a_sync(name, device):
    """A replay appends at the lengths, offsets and pages that it finds."""
    options = {**CALLS[name], "page_size": 4, "rotary_dim": 64}
    call = make_call(device, torch.float16, **options)
    leanattn.warmup(device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(call)
    for lengths in ((0, 1, 2), (20, 21, 22), (-5, 24, INT32_MAX)):
        call["cache_seqlens"].copy_(int32(lengths, device))
        call["block_table"].copy_(call["block_table"].roll(1, 0))
        call["q"].normal_()
        wanted = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in call.items()}
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(wanted)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph.replay()
        for written in ("q", "k_cache", "v_cache"):
            assert torch.equal(bits(call[written]), bits(wanted[written]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_one_launch(name, device):
    call = make_call(device, torch.float16, rotary_dim=2, **CALLS[name])
    names = launched(lambda: run(call))
    assert len(names) == 1, names


@pytest.mark.gpu
def test_cpu_and_cuda_agree(device):
    """Bit for bit where nothing is rotated."""
    for cache_dtype in (torch.float16, torch.bfloat16, *FP8):
        scale = "batch" if cache_dtype in FP8 else None
        call = make_call("cpu", torch.float16, cache_dtype=cache_dtype, scale=scale, seqlen_new=9)
        call["k"] *= 50
        moved = {name: x.to(device) for name, x in call.items()}
        run(call)
        run(moved)
        for name in ("k_cache", "v_cache"):
            actual, wanted = moved[name].cpu().float(), call[name].float()
            assert torch.equal(actual.nan_to_num(1e9), wanted.nan_to_num(1e9))
