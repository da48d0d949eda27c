"""append_decode as an op of torch: schemas, torch.compile, autograd, CUDA graphs; and mistakes."""

import re

import pytest
import torch
from append_cases import INT32_MAX, OPS, bits
from append_decode_cases import cloned, make_step, same_numbers
from cases import int32, sharp_dtype
from test_errors import assert_names, assert_refused
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

import leanattn

ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, "
    "Tensor? block_table=None, *, Tensor? cos=None, Tensor? sin=None, bool interleaved=False, "
    "Tensor? cu_seqlens=None, SymInt? max_seqlen_q=None, float? softmax_scale=None, "
    "bool causal=True, int window_left=-1, int window_right=-1, float softcap=0.0, "
    "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None, "
    "bool batch_invariant=False, Tensor? counters=None"
)
SCHEMAS = {
    "append_decode": ARGUMENTS + ") -> Tensor",
    "append_decode_with_lse": ARGUMENTS + ") -> (Tensor out, Tensor lse)",
    "append_decode_out": ARGUMENTS + ", Tensor(c!) out) -> ()",
}
STEPS = {
    "plain": dict(seqlen_new=2),
    "one-token-3d": dict(seqlen_new=None),
    "ragged": dict(new_lengths=(1, 0, 2)),
    "paged": dict(seqlen_new=1, page_size=8),
}


def clean_step(device, **options):
    """Without NaN, which equals nothing."""
    step = make_step(device, sharp_dtype(device), **options)
    for name in ("k_cache", "v_cache"):
        step[name].nan_to_num_(0)
    return step


def run(op, step):
    """The op's results in a tuple."""
    if op == "append_decode_out":
        out = torch.zeros_like(step["q"])
        OPS.append_decode_out(**step, out=out)
        return (out,)
    result = getattr(OPS, op)(**step)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema(op):
    expected = torch._C.parse_schema(f"leanattn::{op}{SCHEMAS[op]}")
    assert str(getattr(OPS, op).default._schema) == str(expected)


@pytest.mark.parametrize("name", STEPS)
def test_opcheck(name, device):
    """The caches and out change, and nothing else."""
    for rope in (True, False):
        step = clean_step(device, rope=rope, **STEPS[name])
        for op in SCHEMAS:
            more = {"out": torch.zeros_like(step["q"])} if op.endswith("out") else {}
            torch.library.opcheck(getattr(OPS, op).default, (), {**step, **more})


@pytest.mark.parametrize("name", STEPS)
def test_fakes(name):
    """Shapes and dtypes of the results, on a device that need not be there."""
    step = clean_step("cpu", **STEPS[name])
    wanted = OPS.append_decode_with_lse(**cloned(step))
    with FakeTensorMode():
        fake = {
            key: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
            if isinstance(x, torch.Tensor) else x for key, x in step.items()
        }  # fmt: skip
        results = OPS.append_decode_with_lse(**fake)
        assert OPS.append_decode(**fake).shape == wanted[0].shape
        fake["cos"] = torch.empty(step["cos"].shape)
        with pytest.raises(RuntimeError, match="cos must be on k's device"):
            OPS.append_decode(**fake)
    for result, real in zip(results, wanted):
        assert result.shape == real.shape and result.dtype == real.dtype
        assert result.device.type == "cuda" and result.is_contiguous()


# --- torch.compile -------------------------------------------------------------------------------

LAYERS, DIM, CAPACITY = 3, 64, 1013  # a capacity that is nothing else's size


def with_two_caches(q, k, v, k_cache, v_cache, lengths):
    return OPS.append_decode(q * 2, k, v, k_cache, v_cache, lengths) + 1


def split_inside(q, k, v, packed, lengths):
    return OPS.append_decode(q * 2, k, v, *packed.split(DIM, -1), lengths) + 1


def latent(q, k, v, cache, lengths):
    values = [x[..., :DIM] for x in (k, cache)]
    return OPS.append_decode(q * 2, k, values[0], cache, values[1], lengths) + 1


# How a layer is called: what is compiled, the widths of its caches' rows, and the arguments that
# are made of the layer's part of each.
LAYER_CALLS = {
    "apart": (with_two_caches, (DIM, DIM), lambda k, v: (k, v)),
    "packed": (split_inside, (2 * DIM,), lambda packed: (packed,)),
    "latent": (latent, (2 * DIM,), lambda cache: (cache,)),
    "packed-as-two": (with_two_caches, (2 * DIM,), lambda packed: packed.split(DIM, -1)),
}


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", LAYER_CALLS)
def test_one_compiled_layer_for_all_layers_of_one_base(name, backend, dynamic, device, request):
    """Each layer writes to its own part of the base, whichever part the layer was compiled for."""
    if device == "cuda" and backend == "inductor":
        pytest.importorskip("triton")
    if name == "packed-as-two":
        reason = "torch does not guard the offsets of inputs that share memory: docs/own_model.md"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=False))
    function, widths, arguments = LAYER_CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    dtype = sharp_dtype(device)
    dim = 2 * DIM if name == "latent" else DIM
    q = torch.randn(2, 1, 4, dim, device=device).to(dtype)
    k, v = (torch.randn(LAYERS, 2, 1, 2, d, device=device).to(dtype) for d in (dim, DIM))
    lengths = int32([3, 900], device)
    results = []
    for step in (function, compiled):
        torch.manual_seed(1)
        bases = [torch.randn(LAYERS, 2, CAPACITY, 2, width, device=device).to(dtype)
                 for width in widths]  # fmt: skip
        outs = [step(q, k[i], v[i], *arguments(*(base[i] for base in bases)), lengths)
                for i in range(LAYERS)]  # fmt: skip
        results.append((*outs, *bases))
    for actual, wanted in zip(results[1], results[0]):
        torch.testing.assert_close(actual, wanted, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["apart", "packed", "latent"])
def test_no_cache_is_cloned(name, device):
    """By inductor, which clones what it cannot write to in place."""
    if device == "cuda":
        pytest.importorskip("triton")
    function, widths, arguments = LAYER_CALLS[name]
    torch._dynamo.reset()
    dim = 2 * DIM if name == "latent" else DIM
    dtype = sharp_dtype(device)
    q, k, v = (torch.randn(2, 1, heads, d, device=device).to(dtype)
               for heads, d in ((4, dim), (2, dim), (2, DIM)))  # fmt: skip
    caches = [torch.randn(2, CAPACITY, 2, width, device=device).to(dtype) for width in widths]
    compiled = torch.compile(function, fullgraph=True)
    _, codes = run_and_get_code(compiled, q, k, v, *arguments(*caches), int32([3, 900], device))
    allocations = re.findall(r"empty_strided\w*\((.*)\)", "\n".join(codes))
    assert allocations  # or the code is not what it is taken for
    assert not any(str(CAPACITY) in allocation for allocation in allocations), allocations


# --- Autograd ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_backward_says_what_to_use(argument, op, device):
    step = clean_step(device)
    step[argument] = step[argument].requires_grad_() * 1
    results = run(op, step)
    for written in (step["k_cache"], step["v_cache"], *results):
        with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
            written.float().sum().backward()


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_what_is_written_is_known_to_be(name, device):
    step = clean_step(device)
    weight = torch.ones_like(step[name], requires_grad=True)
    loss = (weight * step[name]).sum()
    OPS.append_decode(**step)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- CUDA graphs ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_graph_whose_lengths_advance(name, device):
    """Each replay appends behind the one before and attends to all of it."""
    step = clean_step(device, **STEPS[name])
    eager = cloned(step)
    leanattn.warmup(device)
    out = torch.zeros_like(step["q"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.append_decode_out(**step, out=out)
    for _ in range(4):
        wanted = OPS.append_decode(**eager)
        graph.replay()
        assert same_numbers(out, wanted)
        for written in ("k_cache", "v_cache"):
            assert torch.equal(bits(step[written]), bits(eager[written]))
        for each in (step, eager):
            each["cache_seqlens"] += 2
            each["k"].neg_()


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_no_host_synchronisation(name, device):
    step = clean_step(device, **STEPS[name])
    OPS.append_decode(**step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        OPS.append_decode(**step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- Mistakes ------------------------------------------------------------------------------------


def assert_refused_and_nothing_written(step, arguments, values=(), **more):
    before = {name: step[name].clone() for name in ("k_cache", "v_cache")}
    assert_refused({**step, **more}, arguments, values, "append_decode")
    for name, cache in before.items():
        assert torch.equal(bits(step[name]), bits(cache))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_dtypes_must_be_one(name, device):
    step = clean_step(device)
    step[name] = step[name].bfloat16()
    others = ("q", "v", "k_cache") if name == "k" else (name,)
    assert_refused_and_nothing_written(step, others, (torch.bfloat16,))


def test_q_must_have_ks_tokens(device):
    step = clean_step(device, seqlen_new=2)
    assert_refused_and_nothing_written(step, ("q",), ((3, 1, 4, 64),), q=step["q"][:, :1])
    step = clean_step(device, new_lengths=(1, 0, 2))
    assert_refused_and_nothing_written(step, ("q",), ((2, 4, 64),), q=step["q"][:2])


def test_tables_go_together(device):
    step = clean_step(device)
    assert_refused_and_nothing_written(step, ("sin",), ("None",), sin=None)
    assert_refused_and_nothing_written(step, ("cos",), ("None",), cos=None)
    assert_refused_and_nothing_written(
        step, ("interleaved",), ("True",), cos=None, sin=None, interleaved=True
    )


def test_hints_and_options_are_decodes(device):
    step = clean_step(device)
    assert_refused_and_nothing_written(step, ("max_seqlen_q",), (5,), max_seqlen_q=5)
    assert_refused_and_nothing_written(step, ("window_left",), (-2,), window_left=-2)
    assert_refused_and_nothing_written(step, ("softcap",), (-1,), softcap=-1.0)
    assert_refused_and_nothing_written(step, ("k_scale",), (), k_scale=torch.ones(1, device=device))


def test_head_dims_are_decodes(device):
    step = clean_step(device, dims=(580, 512))
    assert_refused_and_nothing_written(step, ("q",), (580, 576))


def test_out_of_another_shape(device):
    step = clean_step(device)
    before = step["k_cache"].clone()
    with pytest.raises(RuntimeError) as raised:
        OPS.append_decode_out(**step, out=step["q"][:, :1].clone())
    assert_names(str(raised.value), "append_decode_out", ("out",), ((3, 1, 4, 64),))
    assert torch.equal(step["k_cache"], before)


def test_a_knob_that_cannot_be_planned(device, force_units):
    force_units("many")
    for dims in ((64, 64), (36, 36)):
        step = clean_step(device, dims=dims)
        assert_refused_and_nothing_written(step, ("LEANATTN_NUM_UNITS",), ("'many'",))


def test_latent_values_are_the_keys_first_columns(device):
    options = dict(latent=True, heads=(16, 1), dims=(576, 512), seqlen_new=1)
    step = clean_step(device, rope=False, **options)
    assert_refused_and_nothing_written(step, ("v",), ((3, 1, 1, 512),), v=step["v"].clone())
    step = clean_step(device, **options)
    with pytest.raises(RuntimeError, match="cos is not supported"):
        OPS.append_decode(**step)


@pytest.fixture
def check_mode(monkeypatch):
    monkeypatch.setenv("LEANATTN_CHECK", "1")


@pytest.mark.parametrize("name", STEPS)
def test_check_mode_takes_what_is_right(name, device, check_mode):
    OPS.append_decode(**clean_step(device, **STEPS[name]))


def test_check_mode_refuses_what_either_would(device, check_mode):
    step = clean_step(device)
    wrong = int32([5, 24, 17], device)
    assert_refused_and_nothing_written(step, ("cache_seqlens",), (24,), cache_seqlens=wrong)
    step = clean_step(device, page_size=8, seqlen_new=1)
    step["block_table"][2, 0] = -1  # only read
    assert_refused_and_nothing_written(step, ("block_table",), (-1,))
    step = clean_step(device, new_lengths=(1, 0, 2))
    wrong = int32([0, 1, 1, INT32_MAX], device)
    assert_refused_and_nothing_written(step, ("cu_seqlens",), (), cu_seqlens=wrong)
    assert_refused_and_nothing_written(step, ("max_seqlen_q",), (2, 1), max_seqlen_q=1)
