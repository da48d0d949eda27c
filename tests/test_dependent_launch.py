"""LEANATTN_PDL=1: decode starts while the kernel before it ends, and yet sees all that it wrote."""

import pytest
import torch
from cases import check, int32, make_case, run
from reference import assert_same_bits

import leanattn

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["stream_k", "clusters:2", "teams:1"])
def layout(request, device, monkeypatch):
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs programmatic dependent launch")
    monkeypatch.setenv("LEANATTN_LAYOUT", request.param)
    monkeypatch.setenv("LEANATTN_PDL", "1")
    return request.param


def decode_chain(tokens, q, k_cache, v_cache, lengths, counters):
    """Steps that each need all of the one before: append a token, attend, and attend with what came
    out of that."""
    outs = []
    for k, v in tokens:
        leanattn.append_kv(k, v, k_cache, v_cache, lengths)
        lengths += 1
        q = leanattn.decode(q, k_cache, v_cache, lengths, counters=counters)
        q = leanattn.decode(q, k_cache, v_cache, lengths, counters=counters)
        outs.append(q)
    return torch.stack(outs)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("counted", [False, True], ids=["", "counters"])
@pytest.mark.not_emulated
def test_a_chain_of_steps(counted, captured, layout, device, monkeypatch):
    def fresh():
        generator = torch.Generator(device).manual_seed(1)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=device).to(torch.float16)

        tokens = [(normal(3, 1, 4, 128), normal(3, 1, 4, 128)) for _ in range(20)]
        caches = normal(3, 2100, 4, 128), normal(3, 2100, 4, 128)
        return tokens, normal(3, 1, 8, 128), *caches, int32([2000, 700, 5], device)

    counters = leanattn.counters(device) if counted else None
    monkeypatch.setenv("LEANATTN_PDL", "0")
    expected = decode_chain(*fresh(), counters)
    monkeypatch.setenv("LEANATTN_PDL", "1")
    for _ in range(5):
        arguments = fresh()
        if not captured:
            outs = decode_chain(*arguments, counters)
        else:
            lengths = arguments[-1].clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outs = decode_chain(*arguments, counters)
            arguments[-1].copy_(lengths)
            graph.replay()
        assert_same_bits(outs, expected)
    assert not counted or not counters.any()


def test_one_call_after_the_other(layout, device):
    """With the same memory for partials and the same counters."""
    case = make_case(device, torch.float16, lengths=(3000, 500), heads=(8, 2), dims=(128, 128))
    out, lse = check(case)
    for _ in range(50):
        again, lse_again = run(case)
        assert_same_bits(again, out)
        assert_same_bits(lse_again, lse)


def test_a_wrong_value_is_refused(device, monkeypatch):
    monkeypatch.setenv("LEANATTN_PDL", "yes")
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs programmatic dependent launch")
    with pytest.raises(RuntimeError, match="LEANATTN_PDL must be '0' or '1', got 'yes'"):
        run(make_case(device, torch.float16))
