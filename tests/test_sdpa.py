"""scaled_dot_product_attention: torch's results, and the way that the decision table says."""

from types import SimpleNamespace

import pytest
import torch
from reference import COSINE_TOLERANCE
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import leanattn
from leanattn.integrations import torch_flash

LEANATTN = {"cpu": "leanattn", "cuda": "auto"}


def make(device, *, batch=2, heads=(4, 4), queries=1, keys=200, dims=(64, 64), dtype=None):
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    new = dict(device=device, dtype=dtype)
    return (
        torch.randn(batch, heads[0], queries, dims[0], **new),
        torch.randn(batch, heads[1], keys, dims[0], **new),
        torch.randn(batch, heads[1], keys, dims[1], **new),
    )


@pytest.fixture
def calls(monkeypatch):
    """A list that grows with every call of torch's function by ours."""
    made = []

    def counting(*args, **kwargs):
        made.append(args)
        return torch_sdpa(*args, **kwargs)

    monkeypatch.setattr("leanattn.sdpa._torch_sdpa", counting)
    return made


def assert_like_torch(actual, query, key, value, *args, **kwargs):
    wide = (x.double() if isinstance(x, torch.Tensor) else x for x in (query, key, value))
    # By name, for whoever calls this may allow flash only, which has no float64.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch_sdpa(*wide, *args, **kwargs)
    assert actual.shape == expected.shape and actual.dtype == query.dtype
    tolerance = 1e-5 if query.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    cosine = torch.nn.functional.cosine_similarity(
        actual.double().flatten(), expected.flatten(), dim=0
    )
    assert 1 - cosine < COSINE_TOLERANCE


SHAPES = {
    "one-query": dict(),
    "gqa": dict(heads=(8, 2)),
    "mqa": dict(heads=(8, 1), queries=3),
    "as-many-queries-as-keys": dict(queries=16, keys=16),
    "more-queries-than-keys": dict(queries=9, keys=4),
    "fewer-queries": dict(queries=5, keys=33),
    "value-dim": dict(dims=(64, 32)),
}


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.not_emulated
def test_decode_shapes(shape, is_causal, scale, device, monkeypatch, calls):
    """What torch computes, its causal mask from the top left included: with one query and
    is_causal only key 0 is seen."""
    monkeypatch.setenv("LEANATTN_BACKEND", LEANATTN[device])
    inputs = make(device, **SHAPES[shape])
    options = dict(is_causal=is_causal, scale=scale, enable_gqa=True)
    out = leanattn.scaled_dot_product_attention(*inputs, **options)
    assert_like_torch(out, *inputs, **options)
    assert not calls
    assert leanattn.explain(*inputs, **options).backend == "leanattn"


@pytest.mark.not_emulated
def test_transposed_and_sliced_inputs(device, monkeypatch, calls):
    """[B, S, H, D] tensors as they come out of projections."""
    monkeypatch.setenv("LEANATTN_BACKEND", LEANATTN[device])
    query, key, value = make(device, heads=(8, 2), keys=64)
    packed = torch.cat((key, value), -1).transpose(1, 2).contiguous().transpose(1, 2)
    key, value = packed.split(64, -1)
    out = leanattn.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert_like_torch(out, query, key, value, enable_gqa=True)
    assert not calls


def replaced(inputs, index, change):
    inputs = list(inputs)
    inputs[index] = change(inputs[index])
    return inputs


# What is changed, and a word of the reason.
REFUSED = {
    "mask": (lambda i: (i, dict(attn_mask=torch.arange(200, device=i[0].device)[None] != 7)),
             "attn_mask"),
    "dropout": (lambda i: (i, dict(dropout_p=0.5)), "dropout"),
    "gradients": (lambda i: (replaced(i, 1, lambda x: x.requires_grad_()), {}), "gradients"),
    "head-dim": (lambda i: ([x.repeat(1, 1, 1, 10) for x in i], {}), "head dim"),
    "fp64": (lambda i: ([x.double() for x in i], {}), "dtype"),
    "3-D": (lambda i: ([x[0] for x in i], {}), "4-D"),
    "batch": (lambda i: (replaced(i, 0, lambda x: x[:1]), {}), "batch"),
    "empty": (lambda i: (replaced(i, 0, lambda x: x[:, :, :0]), {}), "empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_goes_to_torch(name, device, monkeypatch, calls):
    """Each row of the table: torch's result, the reason in words, and an error when forced."""
    change, reason = REFUSED[name]
    inputs, options = change(make(device))
    assert reason in leanattn.explain(*inputs, **options).reason
    torch.manual_seed(3)
    out = leanattn.scaled_dot_product_attention(*inputs, **options)
    torch.manual_seed(3)
    assert torch.equal(out, torch_sdpa(*inputs, **options))
    assert len(calls) == 1
    monkeypatch.setenv("LEANATTN_BACKEND", "leanattn")
    with pytest.raises(ValueError, match=reason):
        leanattn.scaled_dot_product_attention(*inputs, **options)


def test_nested_tensors_go_to_torch():
    rows = [torch.randn(3, 4, 16), torch.randn(5, 4, 16)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    out = leanattn.scaled_dot_product_attention(nested, nested, nested)
    expected = torch.nn.functional.scaled_dot_product_attention(nested, nested, nested)
    torch.testing.assert_close(out.values(), expected.values())
    assert leanattn.explain(nested, nested, nested).reason == "a tensor is nested"


def test_forward_mode_goes_to_torch(monkeypatch):
    """Though decode steps would not, on a GPU."""
    q, k, v = torch.randn(3, 2, 4, 9, 16).unbind(0)
    q = q[:, :, :1].contiguous()

    def attend(function):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.jvp(lambda x: function(x, k, v), (q,), (torch.ones_like(q),))

    mine = attend(leanattn.scaled_dot_product_attention)
    torch.testing.assert_close(mine, attend(torch.nn.functional.scaled_dot_product_attention))
    monkeypatch.setenv("LEANATTN_BACKEND", "leanattn")
    with pytest.raises(ValueError, match="derivatives are needed"):
        attend(leanattn.scaled_dot_product_attention)


def test_prefill_goes_to_torch(device, monkeypatch, calls):
    """More than 16 queries, unless forced."""
    inputs = make(device, queries=17, heads=(4, 4))
    assert leanattn.explain(*inputs).backend == "torch"
    assert_like_torch(leanattn.scaled_dot_product_attention(*inputs), *inputs)
    assert len(calls) == 1
    monkeypatch.setenv("LEANATTN_BACKEND", "leanattn")
    assert_like_torch(leanattn.scaled_dot_product_attention(*inputs), *inputs)
    assert len(calls) == 1


def test_heads_without_enable_gqa(device):
    """torch's own error, as without us."""
    inputs = make(device, heads=(8, 2))
    assert "enable_gqa" in leanattn.explain(*inputs).reason
    with pytest.raises(RuntimeError):
        leanattn.scaled_dot_product_attention(*inputs)


def test_cpu_goes_to_torch(calls):
    """torch is faster there."""
    inputs = make("cpu")
    assert leanattn.explain(*inputs) == leanattn.Route("torch", "on the CPU torch is faster")
    leanattn.scaled_dot_product_attention(*inputs)
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_cuda_decode_steps_go_to_leanattn(device):
    """Without any override."""
    route = leanattn.explain(*make("cuda"))
    assert route.backend == "leanattn" and "decode step" in str(route)
    assert "dtype" in leanattn.explain(*make("cuda", dtype=torch.float32)).reason
    query, key, value = make("cuda", dims=(56, 64))
    odd = torch.randn(2, 4, 200, 61, dtype=key.dtype, device="cuda")[..., :56]
    assert "aligned" in leanattn.explain(query, odd, value).reason
    query, odd = (x[..., :55] for x in (query, odd))
    assert "odd" in leanattn.explain(query, odd, value).reason


def test_override(monkeypatch, calls):
    """LEANATTN_BACKEND is torch, leanattn, auto, or an error."""
    inputs = make("cpu")
    for name, count in (("torch", 1), ("leanattn", 1), ("auto", 2), ("", 3)):
        monkeypatch.setenv("LEANATTN_BACKEND", name)
        leanattn.scaled_dot_product_attention(*inputs)
        assert len(calls) == count
    assert "LEANATTN_BACKEND" not in leanattn.explain(*inputs).reason
    monkeypatch.setenv("LEANATTN_BACKEND", "flash")
    with pytest.raises(ValueError, match="auto, leanattn or torch, got 'flash'"):
        leanattn.scaled_dot_product_attention(*inputs)


def test_route_reads_well():
    """What a user prints."""
    route = leanattn.explain(*make("cpu"), attn_mask=torch.arange(200)[None] != 7)
    assert str(route) == "torch: there is an attn_mask"
    assert repr(route) == "Route(backend='torch', reason='there is an attn_mask', by=None)"


@pytest.mark.parametrize("backend", ["leanattn", "torch"])
def test_compile(backend, device, monkeypatch):
    """One whole graph, for several lengths, on either way."""
    monkeypatch.setenv("LEANATTN_BACKEND", backend)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *inputs: leanattn.scaled_dot_product_attention(*inputs, enable_gqa=True) * 2,
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    for keys in (100, 37, 64):
        inputs = make(device, heads=(4, 2), keys=keys)
        assert_like_torch(compiled(*inputs) / 2, *inputs, enable_gqa=True)


def test_compiled_code_takes_tensors_that_begin_anywhere(device, monkeypatch):
    """Compiled for one, run for the other: nothing tells a graph to be made anew."""
    monkeypatch.setenv("LEANATTN_BACKEND", LEANATTN[device])
    torch._dynamo.reset()
    compiled = torch.compile(
        leanattn.scaled_dot_product_attention, fullgraph=True, backend="aot_eager"
    )
    query, key, value = make(device, dims=(72, 72))
    for begin in (0, 4, 8):
        inputs = [x[..., begin : begin + 64] for x in (query, key, value)]
        assert_like_torch(compiled(*inputs), *inputs)


@pytest.mark.parametrize("is_causal", [False, True])
def test_opcheck_of_a_compiled_step(is_causal, device):
    """What a graph is told of the result is true."""
    query, key, value = make(device, heads=(4, 2), queries=3, dims=(64, 32))
    torch.library.opcheck(torch.ops.leanattn.sdpa_step, (query, key, value, is_causal, 0.3))


# --- torch's registry ----------------------------------------------------------------------------

needs_registry = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"),
    reason="torch has no registry of flash-attention implementations before 2.11",
)


@needs_registry
def test_registered_and_not_active():
    """import leanattn tells torch the name, no more."""
    assert torch_flash.NAME in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None


@needs_registry
@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="for a torch without CUDA")
def test_activation_without_cuda_says_so():
    with pytest.raises(RuntimeError, match="no CUDA kernel"):
        torch.nn.attention.activate_flash_attention_impl(torch_flash.NAME)
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.parametrize("is_causal", [False, True])
def test_kernel_of_the_registry(is_causal, device):
    """out in query's layout and lse as torch's flash attention gives them."""
    delegated = []
    kernel = torch_flash.make_kernel(lambda *args, **kwargs: delegated.append((args, kwargs)))
    query, key, value = make(device, queries=3, keys=3 if is_causal else 40)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse, *rest = kernel(None, query, key, value, 0.0, is_causal, scale=0.2)
    assert out.stride() == query.stride()
    assert_like_torch(out, query, key, value, is_causal=is_causal, scale=0.2)
    scores = query.double() @ key.double().transpose(2, 3) * 0.2
    if is_causal:
        scores += torch.full_like(scores, -torch.inf).triu(1)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=2e-5, atol=2e-5)
    assert rest[:4] == [None, None, 3, key.shape[2]] and len(rest) == 7
    assert not delegated

    kernel("keys", query, key, value, 0.5)
    kernel("keys", query.repeat(1, 1, 9, 1), key, value)
    kernel("keys", query, key, value, return_debug_mask=True)
    assert [args[0] for args, _ in delegated] == ["keys"] * 3
    assert delegated[0][0][4:] == (0.5, False, False) and delegated[0][1] == {"scale": None}


@needs_registry
@pytest.mark.gpu
@pytest.mark.not_emulated
def test_active_in_torch(device, monkeypatch):
    """Decode steps of torch's own function come here, the rest and gradients stay in torch."""
    made = []

    def counting(*args):
        made.append(args)
        return leanattn.sdpa.decode_bhsd(*args)

    monkeypatch.setattr(torch_flash, "decode_bhsd", counting)
    flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    torch.nn.attention.activate_flash_attention_impl(torch_flash.NAME)
    try:
        with torch.nn.attention.sdpa_kernel(flash):
            step = make("cuda", heads=(8, 2), dtype=torch.bfloat16)
            with torch.no_grad():
                assert_like_torch(torch_sdpa(*step, enable_gqa=True), *step, enable_gqa=True)
            assert len(made) == 1
            prefill = make("cuda", queries=64, keys=64, dtype=torch.bfloat16)
            assert_like_torch(torch_sdpa(*prefill), *prefill)
            for tensor in step:
                tensor.requires_grad_()
            torch_sdpa(*step, enable_gqa=True).sum().backward()
            assert step[0].grad.isfinite().all()
            assert len(made) == 1
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    with torch.nn.attention.sdpa_kernel(flash), torch.no_grad():
        torch_sdpa(*step, enable_gqa=True)
    assert len(made) == 1


@pytest.mark.parametrize("capability, taken", [((8, 0), True), ((8, 9), False), ((9, 0), True)])
def test_wide_heads_go_to_torch_where_they_have_no_room(capability, taken, monkeypatch):
    """Where the op itself would raise. The tensors have shapes and a device, and no GPU."""
    major, minor = capability
    monkeypatch.setattr(leanattn.sdpa, "_HAS_CUDA_KERNELS", True)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(major=major, minor=minor),
    )

    def reason(dim):
        with FakeTensorMode():
            tensors = [torch.empty(1, 1, 8, dim, dtype=torch.float16, device="cuda")] * 3
            return leanattn.sdpa.unsupported(*tensors)

    assert reason(256) is None
    assert (reason(264) is None) == taken


def test_vmap():
    """What it does with torch's function, it does with this one."""
    query, key = torch.randn(3, 2, 4, 5, 16), torch.randn(3, 2, 4, 9, 16)
    expected = torch.func.vmap(torch_sdpa)(query, key, key)
    actual = torch.func.vmap(leanattn.scaled_dot_product_attention)(query, key, key)
    torch.testing.assert_close(actual, expected)


def test_autocast(monkeypatch):
    """torch casts, and leanattn does not: asked for by name it says so."""
    query, key = torch.randn(2, 4, 1, 16), torch.randn(2, 4, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = leanattn.scaled_dot_product_attention(query, key, key)
        assert out.dtype == torch.bfloat16
        monkeypatch.setenv("LEANATTN_BACKEND", "leanattn")
        with pytest.raises(ValueError, match="autocast"):
            leanattn.scaled_dot_product_attention(query, key, key)
        narrow = key.bfloat16()
        out = leanattn.scaled_dot_product_attention(query.bfloat16(), narrow, narrow)
        assert out.dtype == torch.bfloat16


# --- Masks that the op can say -------------------------------------------------------------------


@pytest.mark.parametrize("variant", [causal_lower_right, causal_upper_left])
@pytest.mark.parametrize("queries", [1, 5, 16])
@pytest.mark.not_emulated
def test_causal_masks_of_torch(queries, variant, device, monkeypatch, calls):
    """torch's own objects, which say where their corner is."""
    monkeypatch.setenv("LEANATTN_BACKEND", LEANATTN[device])
    inputs = make(device, heads=(8, 2), queries=queries, keys=40)
    mask = variant(queries, 40)
    out = leanattn.scaled_dot_product_attention(*inputs, mask, enable_gqa=True)
    rows = torch.arange(queries)[:, None] + (40 - queries) * (variant is causal_lower_right)
    assert_like_torch(out, *inputs, (torch.arange(40) <= rows).to(device), enable_gqa=True)
    assert not calls
    # Of other lengths it is torch's to say what is wrong.
    assert "attn_mask" in reason_of_torch(*inputs, variant(queries, 39), enable_gqa=True)


def reason_of_torch(*arguments, **options):
    try:
        return leanattn.explain(*arguments, **options).reason
    except ValueError as error:  # leanattn by name
        return str(error)


@pytest.mark.parametrize("queries", [1, 5])
def test_padding_that_the_host_can_read(queries, monkeypatch, calls):
    """A bool mask on the CPU whose rows are prefixes, in every shape that broadcasts."""
    monkeypatch.setenv("LEANATTN_BACKEND", "leanattn")
    inputs = make("cpu", heads=(4, 4), queries=queries, keys=40)
    padding = torch.arange(40) < torch.tensor([[7], [40]])
    for mask in (
        padding[:, None, None],
        padding[:, None, None].expand(2, 4, queries, 40),
        padding[:1].expand(queries, 40),
    ):
        out = leanattn.scaled_dot_product_attention(*inputs, mask)
        assert_like_torch(out, *inputs, mask)
    assert not calls


@pytest.mark.parametrize(
    "mask",
    [
        torch.arange(40)[None] != 7,
        torch.arange(40)[None] >= 7,
        torch.zeros(1, 40, dtype=torch.bool),  # torch's result for no key at all
        torch.arange(40) <= torch.arange(5)[:, None],
        torch.zeros(1, 40),
        torch.ones(3, 1, 1, 40, dtype=torch.bool),
    ],
    ids=["hole", "left", "nothing", "a-row-each", "float", "other-batch"],
)
def test_other_masks_are_torchs(mask, monkeypatch):
    monkeypatch.setenv("LEANATTN_BACKEND", "leanattn")
    with pytest.raises(ValueError, match="there is an attn_mask"):
        leanattn.scaled_dot_product_attention(*make("cpu", queries=5, keys=40), mask)


@pytest.mark.gpu
@pytest.mark.not_emulated
def test_a_mask_on_a_gpu_is_not_read(device):
    """The host would have to wait for it."""
    inputs = make("cuda", queries=5, keys=40)
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert leanattn.explain(*inputs, mask).reason == "there is an attn_mask"
    finally:
        torch.cuda.set_sync_debug_mode("default")
