"""merge_states: partial results over disjoint keys become the result over all of them."""

import math

import pytest
import torch
from cases import check, make_case, run, sharp_dtype
from reference import assert_same_bits, assert_same_specials
from test_errors import assert_refused

import leanattn

OPS = torch.ops.leanattn


def merge_reference(outs, lses):
    """The definition in fp64: weights exp(lse), states that saw nothing left out."""
    seen = ~lses.isinf()
    logits = torch.where(seen, lses.double(), -math.inf)
    lse = torch.logsumexp(logits, 0)
    weights = torch.exp(logits - torch.where(lse.isneginf(), 0, lse))
    terms = torch.where(seen[..., None], weights[..., None] * outs.double(), 0)
    return terms.sum(0), lse


def assert_merged(outs, lses):
    """Run the op and hold it against fp64: half a unit of the dtype, fp32's own error beside it."""
    out, lse = OPS.merge_states(outs, lses)
    want, want_lse = merge_reference(outs, lses)
    assert out.dtype == outs.dtype and lse.dtype == torch.float32
    assert out.shape == outs.shape[1:] and lse.shape == outs.shape[1:-1]
    assert out.is_contiguous() and lse.is_contiguous()
    assert_same_specials("out", out, want.to(out.dtype))
    assert_same_specials("lse", lse, want_lse.float())
    finite, finite_lse = want.isfinite(), want_lse.isfinite()
    size = torch.where(lses.isinf()[..., None], 0, outs.double().abs()).nan_to_num(0, 0, 0)
    limit = (torch.finfo(out.dtype).eps * want.abs() + 4e-6 * size.amax(0)
             + torch.finfo(out.dtype).smallest_normal) if len(outs) else want  # fmt: skip
    assert ((out.double() - want).abs() <= limit)[finite].all()
    error = (lse.double() - want_lse).abs()
    assert (error <= 1e-6 * want_lse.abs().clamp(min=1))[finite_lse].all()
    return out, lse


def states(device, dtype, n, rows, dim, spread=3.0):
    outs = torch.randn(n, *rows, dim, device=device).add_(0.5).to(dtype)
    return outs, spread * torch.randn(n, *rows, device=device)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def any_dtype(request):
    """Partial results may be fp32 on CUDA too."""
    return request.param


@pytest.mark.parametrize("dim", [1, 7, 8, 64, 72, 128, 576, 3000])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 33])
def test_merge(n, dim, device, any_dtype):
    assert_merged(*states(device, any_dtype, n, (3, 5), dim))


@pytest.mark.parametrize(
    "rows", [(), (1,), (1, 1, 1), (2, 3, 4), (2, 1, 3, 2, 2, 1, 2), (0,), (3, 0, 2), (130, 9)]
)
def test_leading_shape(rows, device):
    outs, lses = states(device, torch.float16, 3, rows, 64)
    assert_merged(outs, lses)


def test_lses_far_apart_and_large(device, any_dtype):
    """Differences are taken before anything is scaled: lses of 10^4 lose no digit."""
    outs, lses = states(device, any_dtype, 4, (64,), 16)
    for shift in (1e4, -1e4, 80.0, -200.0):
        assert_merged(outs, lses + shift)
    assert_merged(outs, lses * 1e4)
    assert_merged(outs, lses * 1e30)


def test_one_state_comes_back_bit_for_bit(device, any_dtype):
    outs, lses = states(device, any_dtype, 1, (9, 4), 64, spread=1000.0)
    out, lse = OPS.merge_states(outs, lses)
    assert_same_bits(out, outs[0])
    assert_same_bits(lse, lses[0])


@pytest.mark.parametrize("empty", [-math.inf, math.inf])
@pytest.mark.parametrize("content", [0.0, math.nan, math.inf])
def test_states_that_saw_nothing(content, empty, device, any_dtype):
    """Neither convention of an empty lse gives a weight, and what lies in out is never used."""
    outs, lses = states(device, any_dtype, 3, (8, 2), 40)
    for which in ([0], [2], [0, 1], [0, 2], [0, 1, 2]):
        some, some_lses = outs.clone(), lses.clone()
        some[which, 3:5], some_lses[which, 3:5] = content, empty
        out, lse = assert_merged(some, some_lses)
        rest = [i for i in range(3) if i not in which]
        rest_out, rest_lse = OPS.merge_states(outs[rest], lses[rest])
        assert_same_bits(out[3:5], rest_out[3:5])
        assert_same_bits(lse[3:5], rest_lse[3:5])
    assert (out[3:5] == 0).all() and lse[3:5].isneginf().all()


def test_nan_stays_in_its_row(device, any_dtype):
    """NaN in an lse makes its row NaN, NaN in an out its own element."""
    outs, lses = states(device, any_dtype, 3, (8, 2), 40)
    lses[1, 2, 0] = lses[:, 4, 1] = math.nan
    outs[2, 6, 1, 17] = math.nan
    out, lse = assert_merged(outs, lses)
    assert out[2, 0].isnan().all() and out[4, 1].isnan().all() and out.isnan().sum() == 81
    assert lse.isnan().sum() == 2


def strided_states(name, outs, lses):
    """The same values with other strides."""
    n, rows, heads, dim = outs.shape
    if name == "heads-first":
        outs = outs.transpose(1, 2).contiguous().transpose(1, 2)
        return outs, lses.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if name == "states-last":
        outs = outs.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
        return outs, lses.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if name == "slice":
        big = outs.new_full((n, rows, heads + 1, dim + 16), 7.0)
        big[:, :, 1:, 8:-8] = outs
        return big[:, :, 1:, 8:-8], lses
    if name == "misaligned":
        memory = outs.new_zeros(outs.numel() + 1)
        return memory[1:].view(outs.shape).copy_(outs), lses
    if name == "last-stride":
        return outs.transpose(1, 3).contiguous().transpose(1, 3), lses
    assert name == "lses-with-a-stride"
    return outs, torch.stack([lses, lses], -1)[..., 1]


@pytest.mark.parametrize(
    "name",
    ["heads-first", "states-last", "slice", "misaligned", "last-stride", "lses-with-a-stride"],
)
def test_strides(name, device, any_dtype):
    outs, lses = states(device, any_dtype, 3, (6, 4), 64)
    outs[1, 2], lses[1, 2] = math.nan, -math.inf
    out, lse = assert_merged(outs, lses)
    strided = strided_states(name, outs, lses)
    assert torch.equal(strided[1], lses)
    again, again_lse = OPS.merge_states(*strided)
    assert_same_bits(again, out)
    assert_same_bits(again_lse, lse)


def test_more_dimensions_than_the_kernel_walks(device):
    """Six dimensions of which no two can be joined."""
    outs, lses = states(device, torch.float16, 2, (2, 3, 2, 3, 2, 3), 8)
    order = [0, 6, 5, 4, 3, 2, 1]
    scattered = outs.permute(*order, 7).contiguous().permute(*order, 7)
    out, lse = assert_merged(outs, lses)
    again, again_lse = OPS.merge_states(scattered, lses)
    assert_same_bits(again, out)
    assert_same_bits(again_lse, lse)


def test_expanded_states(device):
    """Stride 0: the same state twice has its out and log(2) more."""
    outs, lses = states(device, torch.float32, 1, (5,), 64)
    out, lse = assert_merged(outs.expand(2, 5, 64), lses.expand(2, 5))
    assert_same_bits(out, outs[0])
    torch.testing.assert_close(lse, lses[0] + math.log(2))


def test_same_bits_alone_and_in_a_batch(device, any_dtype):
    """A row's bits depend on nothing but its own states."""
    outs, lses = states(device, any_dtype, 5, (300,), 64)
    out, lse = OPS.merge_states(outs, lses)
    for row in (0, 17, 299):
        alone, alone_lse = OPS.merge_states(outs[:, row], lses[:, row])
        assert_same_bits(alone, out[row])
        assert_same_bits(alone_lse, lse[row])


@pytest.mark.parametrize("cut", [0, 1, 100, 128, 200, 250])
def test_two_halves_equal_the_whole(cut, device, dtype):
    """Keys before and after a cut, decoded apart and merged: the result of one decode."""
    case = make_case(device, dtype, lengths=(250, 130, 250), capacity=250, causal=False, seqlen_q=2)
    whole, whole_lse = check(case)
    first = {**case, "cache_seqlens": case["cache_seqlens"].clamp(max=cut)}
    second = {
        **case,
        "k_cache": case["k_cache"][:, cut:],
        "v_cache": case["v_cache"][:, cut:],
        "cache_seqlens": case["cache_seqlens"] - cut,  # below 0: no key
    }
    parts = [run(first), run(second)]
    out, lse = OPS.merge_states(*(torch.stack(tensors) for tensors in zip(*parts)))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, whole, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)


MISTAKES = {
    "outs-float64": ("outs", ((3, 4, 8), torch.float64), (torch.float64,)),
    "lses-half": ("lses", ((3, 4), torch.float16), (torch.float16,)),
    "lses-float64": ("lses", ((3, 4), torch.float64), (torch.float64,)),
    "outs-1d": ("outs", ((3,), torch.float32), ((3,),)),
    "lses-rows": ("lses", ((3, 5), torch.float32), ((3, 5), (3, 4))),
    "lses-states": ("lses", ((2, 4), torch.float32), ((2, 4), (3, 4))),
    "lses-rank": ("lses", ((3, 4, 1), torch.float32), ((3, 4, 1),)),
    "no-head-dim": ("outs", ((3, 4, 0), torch.float32), ((3, 4, 0),)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, device):
    argument, wrong, values = MISTAKES[name]
    good = dict(outs=((3, 4, 8), torch.float32), lses=((3, 4), torch.float32))
    call = {
        key: torch.zeros(shape, dtype=dtype, device=device)
        for key, (shape, dtype) in {**good, argument: wrong}.items()
    }
    assert_refused(call, (argument,), values, "merge_states")


@pytest.mark.parametrize("argument", ["outs", "lses"])
def test_meta_tensor(argument, device):
    call = dict(zip(("outs", "lses"), states(device, torch.float32, 2, (3,), 8)))
    call[argument] = call[argument].to("meta")
    assert_refused(call, ("lses", "outs"), ("meta",), "merge_states")


@pytest.mark.gpu
@pytest.mark.not_emulated
@pytest.mark.parametrize("argument", ["outs", "lses"])
def test_cpu_tensor_among_cuda_ones(argument, device):
    call = dict(zip(("outs", "lses"), states(device, torch.float32, 2, (3,), 8)))
    call[argument] = call[argument].cpu()
    assert_refused(call, ("lses", "outs"), ("cpu",), "merge_states")


def test_schema():
    arguments = "Tensor outs, Tensor lses, *, ScalarType? dtype=None"
    expected = f"leanattn::merge_states({arguments}) -> (Tensor out, Tensor lse)"
    assert str(OPS.merge_states.default._schema) == expected


def test_opcheck(device):
    torch.library.opcheck(OPS.merge_states.default, states(device, torch.float16, 3, (4, 2), 64))


def test_compile(device):
    """Inductor hands over buffers of its own; sizes are symbolic."""
    if device == "cuda":
        pytest.importorskip("triton")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(outs, lses):
        out, lse = leanattn.merge_states(outs * 2, lses + 1)
        return out + 1, lse - 1

    for n, rows in ((2, 4), (3, 7)):
        outs, lses = states(device, sharp_dtype(device), n, (rows, 2), 64)
        out, lse = OPS.merge_states(outs * 2, lses + 1)
        for actual, expected in zip(compiled(outs, lses), (out + 1, lse - 1)):
            torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("argument", [0, 1])
def test_backward_says_what_to_use(argument, device):
    inputs = states(device, torch.float32, 2, (3,), 8)
    inputs[argument].requires_grad_()
    with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
        OPS.merge_states(*inputs)[0].sum().backward()


@pytest.mark.gpu
def test_one_launch_without_a_sync_also_in_a_graph(device):
    """No wait for the GPU; a replay merges what then lies there."""
    outs, lses = states(device, torch.float16, 3, (40, 8), 128)
    leanattn.warmup(device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = OPS.merge_states(outs, lses)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            outs.normal_()
            graph.replay()
            expected, expected_lse = OPS.merge_states(outs, lses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)
