"""The reference itself, against torch's own attention and against hand-made cases."""

import math

import pytest
import torch
from reference import assert_close, assert_same_bits, reference, same_dtype, ulp
from torch.nn.functional import scaled_dot_product_attention


def tensors(batch=2, seqlen_q=5, capacity=40, heads=(6, 2), dims=(16, 24), dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q = normal(batch, seqlen_q, heads[0], dims[0])
    return q, normal(batch, capacity, heads[1], dims[0]), normal(batch, capacity, heads[1], dims[1])


def visible_mask(seqlen_q, length, causal, window_left, window_right):
    """The Visibility paragraph, key by key: [Sq, L] of bool."""
    mask = torch.zeros(seqlen_q, length, dtype=torch.bool)
    for i in range(seqlen_q):
        p = length - seqlen_q + i
        for j in range(length):
            mask[i, j] = (
                (not causal or j <= p)
                and (window_left < 0 or j >= p - window_left)
                and (window_right < 0 or j <= p + window_right)
            )
    return mask


@pytest.mark.parametrize(
    "causal, window_left, window_right",
    [(True, -1, -1), (False, -1, -1), (True, 3, 0), (False, 3, 1), (False, -1, 2), (False, 7, -1)],
)
def test_reference_agrees_with_sdpa(causal, window_left, window_right):
    """The reference is judged by an attention that somebody else wrote, mask by mask."""
    q, k, v = tensors()
    lengths = torch.tensor([40, 23], dtype=torch.int32)
    out, lse = reference(
        q, k, v, lengths, causal=causal, window_left=window_left, window_right=window_right
    )
    for b, length in enumerate(lengths.tolist()):
        mask = visible_mask(q.shape[1], length, causal, window_left, window_right)
        query = q[b].transpose(0, 1)
        key, value = (x[b, :length].transpose(0, 1).repeat_interleave(3, 0) for x in (k, v))
        expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        torch.testing.assert_close(out[b].transpose(0, 1), expected, rtol=1e-12, atol=1e-12)
        scores = (query @ key.transpose(1, 2)) * 16**-0.5
        expected_lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(lse[b].transpose(0, 1), expected_lse, rtol=1e-12, atol=1e-12)


def test_reference_options_agree_with_a_bias_in_sdpa():
    """softcap, then ALiBi, then the sink: the order of the contract."""
    q, k, v = tensors(batch=1, seqlen_q=2, heads=(4, 4))
    slopes = torch.tensor([0.1, 0.5, 0.0, 0.03], dtype=torch.float64)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], dtype=torch.float64)
    out, lse = reference(q, k, v, softmax_scale=0.7, softcap=1.5, alibi_slopes=slopes, sinks=sinks)
    for head in range(4):
        for i in range(2):
            p = 38 + i
            j = torch.arange(p + 1)
            s = 1.5 * torch.tanh(0.7 * (k[0, : p + 1, head] @ q[0, i, head]) / 1.5)
            s = s - slopes[head] * (p - j).abs()
            denominator = s.exp().sum() + sinks[head].exp()
            expected = (s.exp() / denominator) @ v[0, : p + 1, head]
            torch.testing.assert_close(out[0, i, head], expected)
            torch.testing.assert_close(lse[0, i, head], denominator.log())


def test_reference_rows_that_see_nothing():
    """Out 0, lse -inf or the sink; rows that no sequence covers have no sink either."""
    q, k, v = tensors(batch=2, seqlen_q=3)
    lengths = torch.tensor([0, 2], dtype=torch.int32)
    sinks = torch.arange(6, dtype=torch.float32)
    out, lse = reference(q, k, v, lengths)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert (out[1, 0] == 0).all() and lse[1, 1:].isfinite().all()
    assert (reference(q, k, v, lengths, sinks=sinks)[1][0] == sinks).all()
    bad_offsets = torch.tensor([1, 0, 100], dtype=torch.int32)
    out, lse = reference(q.flatten(0, 1), k, v, cu_seqlens_q=bad_offsets, sinks=sinks)
    assert (lse[0] == -torch.inf).all() and lse[1:].isfinite().all()


def test_reference_touches_visible_keys_only():
    """NaN reaches the rows that see it and no others."""
    q, k, v = tensors(batch=1, seqlen_q=4, capacity=50)
    lengths = torch.tensor([40], dtype=torch.int32)
    clean, _ = reference(q, k, v, lengths)
    k[0, 40:], v[0, 40:] = torch.nan, torch.inf
    v[0, 38, 1] = torch.nan
    out, lse = reference(q, k, v, lengths)
    assert out[0, 2:, 3:].isnan().all() and lse.isfinite().all()
    torch.testing.assert_close(out[0, :2], clean[0, :2])
    torch.testing.assert_close(out[0, :, :3], clean[0, :, :3])


def test_same_dtype_is_near_but_not_exact():
    """A yardstick without error would forbid every rounding, one with a large error none."""
    q, k, v = tensors(dtype=torch.bfloat16)
    error = (same_dtype(q, k, v).double() - reference(q, k, v)[0]).abs().max()
    assert 1e-4 < error < 5e-2


def test_ulp():
    """Spacing at a power of two, just below it, and at zero."""
    magnitude = torch.tensor([1.0, 0.999, 2.5, 0.0], dtype=torch.float64)
    expected = torch.tensor([2.0**-7, 2.0**-8, 2.0**-6, 2.0**-133], dtype=torch.float64)
    assert torch.equal(ulp(magnitude, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_assert_close_accepts_the_rounded_truth_and_refuses_small_wrongs(dtype):
    """The gate itself: a few ulp in one element, a lost key, a wrong -inf, a NaN."""
    q, k, v = tensors(dtype=dtype)
    case = dict(q=q, k_cache=k, v_cache=v)
    truth, true_lse = reference(**case)
    out, lse = truth.to(dtype), true_lse.float()
    assert_close(out, lse, **case)

    def refused(out, lse):
        with pytest.raises(AssertionError):
            assert_close(out, lse, **case)

    for wrong in (torch.nan, torch.inf, 1.1 * out[1, 2, 3].abs().max().item() + 0.1):
        changed = out.clone()
        changed[1, 2, 3, 4] = wrong
        refused(changed, lse)
    refused(out, lse + 1e-4)
    refused(out, torch.full_like(lse, -torch.inf))
    refused(out[:, :4], lse[:, :4])
    lost_out, lost_lse = reference(q, k[:, 1:], v[:, 1:])
    refused(lost_out.to(dtype), true_lse.float())
    refused(out, lost_lse.float())


def test_assert_close_knows_weights_that_count_as_0():
    """A row of 2^-112 may be 0; one of 2^-100 may not, nor may a row of 0 be 2^-112."""
    q, k, v = tensors(dtype=torch.bfloat16)
    sinks = torch.full((6,), 112 * math.log(2))
    case = dict(q=0 * q, k_cache=k, v_cache=torch.ones_like(v) / 40)
    for sinks, passes in ((sinks, True), (sinks * 100 / 112, False)):
        truth, lse = (x for x in reference(**case, sinks=sinks))
        assert truth.min() > 0
        assert_close(truth.bfloat16(), lse.float(), **case, sinks=sinks)
        if passes:
            assert_close(0 * truth.bfloat16(), lse.float(), **case, sinks=sinks)
        else:
            with pytest.raises(AssertionError, match="out"):
                assert_close(0 * truth.bfloat16(), lse.float(), **case, sinks=sinks)
    nothing = dict(case, cache_seqlens=torch.zeros(2, dtype=torch.int32))
    out = torch.zeros_like(truth, dtype=torch.bfloat16)
    lse = torch.full_like(lse, -torch.inf).float()
    assert_close(out, lse, **nothing)
    with pytest.raises(AssertionError, match="out"):
        assert_close(out + 2.0**-112, lse, **nothing)


def test_assert_same_bits_sees_signed_zero_and_accepts_nan():
    """`==` would not see the first and would refuse the second."""
    nan = torch.tensor([torch.nan, 1.0])
    assert_same_bits(nan, nan.clone())
    with pytest.raises(AssertionError, match=r"\[1\]"):
        assert_same_bits(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0]))
