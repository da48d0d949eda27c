"""leanattn.distributed: one sequence over several processes, against one process with all tokens.

gloo on the CPU, with 2 and 4 ranks; NCCL where there are two GPUs. The processes start once.
"""

import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import int32, make_case
from dealing import DEALINGS, capacity_of, deal, part_of
from ranks import TIME_OUT, Ranks, on, on_cpu
from reference import assert_close, assert_same_bits
from test_docs import run_page

import leanattn
import leanattn.distributed

CASES = {
    "one-query": dict(seqlen_q=None),
    "causal-queries": dict(seqlen_q=5),
    "more-queries-than-tokens": dict(seqlen_q=9, lengths=(4, 300, 0)),
    "not-causal": dict(seqlen_q=3, causal=False),
    "window": dict(seqlen_q=4, window_left=50),
    "window-on-both-sides": dict(seqlen_q=6, causal=False, window_left=20, window_right=2),
    "alibi": dict(seqlen_q=3, alibi="batch"),
    "softcap-and-sinks": dict(seqlen_q=2, softcap=3.0, sinks=True),
    "ragged-queries": dict(query_lengths=(3, 0, 20)),
    "batch-invariant": dict(batch_invariant=True),
    "empty-and-short": dict(lengths=(0, 1, 2, 17, 200), sinks=True),
    "odd-heads-and-dims": dict(heads=(5, 5), dims=(40, 24)),
}


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def ranks(request, tmp_path_factory):
    """4 ranks on the CPU, or as many as there are GPUs, up to 4."""
    size = 4
    if request.param == "nccl":
        if request.config.getoption("emulated_gpu"):
            pytest.skip("an emulated GPU is alone")
        size = min(torch.cuda.device_count(), 4)
        if size < 2:
            pytest.skip("needs two GPUs")
    ranks = Ranks(size, request.param, tmp_path_factory.mktemp("ranks"))
    ranks.dtype = torch.float32 if request.param == "gloo" else torch.bfloat16
    ranks.dims = dict(dims=(128, 128)) if request.param == "nccl" else {}
    yield ranks
    ranks.close()


def dealings(ranks):
    return [(n, interleave) for n, interleave in DEALINGS if n <= len(ranks.processes)]


# --- What the ranks do ---------------------------------------------------------------------------


def own_part(group, device, case, interleave, page_size=None):
    """The arguments of distributed.decode on this rank."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    call = deal(on(device, case), n, rank, interleave, page_size)
    if page_size is not None:  # whose last page may make the capacity more than a stretch
        _, interleave = capacity_of(case["k_cache"].shape[1], n, interleave)
    return dict(call, group=group, interleave=interleave)


def decode(group, device, cases, interleave, page_size=None):
    results = []
    for case in cases:
        call = own_part(group, device, case, interleave, page_size)
        out = leanattn.distributed.decode(**call)
        again, lse = leanattn.distributed.decode(**call, return_lse=True)
        assert_same_bits(again, out)
        results.append(on_cpu((out, lse)))
    return results


def decode_compiled(group, device, case, backend):
    call = own_part(group, device, case, None)
    expected = leanattn.distributed.decode(**call, return_lse=True)
    with torch.inference_mode():
        compiled = torch.compile(leanattn.distributed.decode, fullgraph=True, backend=backend)
        results = compiled(**call, return_lse=True)
    for actual, wanted in zip(results, expected):
        assert_same_bits(actual, wanted)


def decode_in_a_graph(group, device, case, new_lengths):
    """Of a replay with other lengths."""
    call = own_part(group, device, case, None)
    leanattn.distributed.decode(**call)  # sets up NCCL
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = leanattn.distributed.decode(**call, return_lse=True)
    call["cache_seqlens"].copy_(torch.tensor(new_lengths))
    graph.replay()
    torch.cuda.synchronize()
    return on_cpu(results)


def append(group, device, case, interleave, before, rotated):
    """(q, this rank's K and V) after the tokens from `before` on were appended to empty caches."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    call = own_part(group, device, case, interleave)
    rows = [case[name].to(device)[:, before:].clone() for name in ("k_cache", "v_cache")]
    caches = [call[name] for name in ("k_cache", "v_cache")]
    total = case["k_cache"].shape[1]
    _, unit = capacity_of(total, n, interleave)
    for key, token in enumerate(t for t in range(total) if t // unit % n == rank):
        if token >= before:
            caches[0][:, key] = caches[1][:, key] = 5.0
    lengths = torch.full((len(rows[0]),), before, dtype=torch.int32, device=device)
    place = dict(group=group, interleave=interleave)
    if rotated is None:
        leanattn.distributed.append_kv(*rows, *caches, lengths, **place)
        return on_cpu((call["q"], *caches))
    tables = [table.to(device) for table in rotated]
    q = call["q"].clone()
    leanattn.distributed.rope_append_kv(q, *rows, *caches, lengths, None, *tables, **place)
    return on_cpu((q, *caches))


def error_of(group, device, case, changes):
    """The message, and how long it took."""
    start = time.perf_counter()
    try:
        call = own_part(group, device, case, None)
        leanattn.distributed.decode(**call | changes)
    except (RuntimeError, TypeError) as error:
        return str(error), time.perf_counter() - start
    return None


# --- Tests ---------------------------------------------------------------------------------------


def single(case):
    """The same tokens in one process on the CPU."""
    return torch.ops.leanattn.decode_with_lse(**case)


def assert_whole(results, cases):
    """Every rank has the result over all tokens, with the same bits."""
    for of_rank in results[1:]:
        for first, other in zip(results[0], of_rank):
            for tensor, other_tensor in zip(first, other):
                assert_same_bits(other_tensor, tensor)
    for (out, lse), case in zip(results[0], cases):
        assert_close(out, lse, **{k: x for k, x in case.items() if k != "batch_invariant"})
        expected, expected_lse = single(case)
        if out.dtype == torch.float32:
            torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(lse, expected_lse, atol=1e-6, rtol=1e-6)


def make_cases(ranks, names=CASES, **more):
    # What a case says of dims goes before.
    return [make_case("cpu", ranks.dtype, **(ranks.dims | CASES[name] | more)) for name in names]


def test_all_ranks_have_the_whole_result(ranks):
    """Each way of dealing out, each kind of call."""
    cases = make_cases(ranks)
    for size, interleave in dealings(ranks):
        assert_whole(ranks.run(decode, cases, interleave, size=size), cases)


def test_pages(ranks):
    cases = make_cases(ranks, ["one-query", "window", "alibi"])
    for page_size in (1, 16):
        for size, interleave in dealings(ranks):
            assert_whole(ranks.run(decode, cases, interleave, page_size, size=size), cases)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bits(ranks, dtype):
    """Rounded once: as exact as one call."""
    options = [dict(seqlen_q=3), dict(mean=2.0), dict(alibi="heads", sinks=True)]
    cases = [make_case("cpu", dtype, dims=(128, 128), **more) for more in options]
    for size, interleave in dealings(ranks)[:3]:
        assert_whole(ranks.run(decode, cases, interleave, size=size), cases)


def test_float8_and_latent_caches(ranks):
    if ranks.dtype != torch.float32:
        pytest.skip("is a matter of the op, not of the exchange")
    cases = [
        make_case("cpu", torch.bfloat16, cache_dtype=torch.float8_e4m3fn, scales="heads",
                  poison=None),
        make_case("cpu", torch.float32, heads=(4, 1), dims=(576, 512), values_in_keys=True),
    ]  # fmt: skip
    assert_whole(ranks.run(decode, cases[:1], 16, size=2), cases[:1])
    assert_whole(ranks.run(decode, cases[1:], None, size=2), cases[1:])


def test_no_sequences_and_no_queries(ranks):
    """Nothing to exchange is no deadlock."""
    for options in (dict(lengths=(), capacity=8), dict(seqlen_q=0, lengths=(3, 4))):
        case = make_case("cpu", ranks.dtype, **options, **ranks.dims)
        for (out, lse), *_ in ranks.run(decode, [case], None, size=2):
            assert out.shape == case["q"].shape and lse.shape == out.shape[:-1]


def test_compiled(ranks):
    """Without a graph break, and with the same bits."""
    case = make_case("cpu", ranks.dtype, seqlen_q=2, **ranks.dims)
    ranks.run(decode_compiled, case, "aot_eager" if ranks.dtype == torch.float32 else "inductor",
              size=2)  # fmt: skip


def test_graph_replay_with_other_lengths(ranks):
    """Lengths and shares are found on the device, the exchange is part of the graph."""
    if ranks.dtype == torch.float32:
        pytest.skip("needs GPUs")
    case = make_case("cpu", ranks.dtype, lengths=(5, 300, 0), poison=None, **ranks.dims)
    results = ranks.run(decode_in_a_graph, case, [311, 2, 150])
    assert_whole(
        [[pair] for pair in results], [case | {"cache_seqlens": int32([311, 2, 150], "cpu")}]
    )


@pytest.mark.parametrize("rope", [False, True], ids=["plain", "rope"])
def test_append(ranks, rope):
    """Each rank writes what is dealt to it; with rope, turned by the position among all tokens."""
    total, before = 96, 61
    case = make_case("cpu", ranks.dtype, lengths=(total,) * 2, capacity=total,
                     seqlen_q=total - before, poison=None, **ranks.dims)  # fmt: skip
    whole = dict(case, q=case["q"].clone(), k_cache=case["k_cache"].clone())
    tables = None
    if rope:
        angles = torch.outer(torch.arange(total), 0.1 * torch.arange(1, 17))
        tables = angles.cos(), angles.sin()
        rows = [case[name][:, before:].clone() for name in ("k_cache", "v_cache")]
        leanattn.rope_append_kv(whole["q"], *rows, whole["k_cache"], whole["v_cache"],
                                int32([before] * 2, "cpu"), None, *tables)  # fmt: skip
    for size, interleave in dealings(ranks):
        results = ranks.run(append, case, interleave, before, tables, size=size)
        for rank, (q, k, v) in enumerate(results):
            expected = [
                part_of(whole[name], size, rank, interleave) for name in ("k_cache", "v_cache")
            ]
            for actual, wanted in zip((q, k, v), (whole["q"], *expected)):
                if rope and q.dtype != torch.float32:  # a GPU may fuse a product and a sum
                    torch.testing.assert_close(actual, wanted, equal_nan=True)
                else:
                    assert_same_bits(actual, wanted)


def test_a_mistake_is_told_before_anything_is_exchanged(ranks):
    """On every rank at once, by the op that it is about; the next call works."""
    case = make_case("cpu", ranks.dtype, poison=None, **ranks.dims)
    for changes, text in (
        (dict(window_left=-2), "window_left must be >= -1"),
        (dict(interleave=0), "cp_interleave must be from 1"),
        (dict(cp_rank=1), "cp_rank"),
    ):
        for message, _ in ranks.run(error_of, case, changes, size=2):
            assert text in message
    assert_whole(ranks.run(decode, [case], None, size=2), [case])


def test_a_process_outside_the_group(ranks):
    """Which would have no part to decode."""
    message = ranks.run(call_of_another_group)[-1]
    assert "leanattn.distributed: group must be one that this process belongs to" in message


def call_of_another_group(group, device):
    others = dist.new_group([0])
    q = torch.zeros(1, 2, 64, device=device, dtype=torch.float16)
    cache = torch.zeros(1, 4, 2, 64, device=device, dtype=torch.float16)
    if dist.get_rank(group) == 0:
        return None
    try:
        leanattn.distributed.decode(q, cache, cache, group=others)
    except RuntimeError as error:
        return str(error)


def test_a_rank_that_is_gone(tmp_path):
    """An error that says what failed, within the group's time-out, and no waiting for ever."""
    ranks = Ranks(2, "gloo", tmp_path)
    try:
        case = make_case("cpu", torch.float32)
        assert_whole(ranks.run(decode, [case], None), [case])
        ranks.processes[1].kill()
        ranks.processes[1].join()
        ranks.connections[0].send((error_of, 2, (case, {})))
        (message, seconds), error = ranks.receive(ranks.connections[0])
        assert error is None and seconds < TIME_OUT + 10
        assert (
            "leanattn.distributed.decode: the exchange with the group's 2 ranks failed" in message
        )
    finally:
        ranks.close()


def run_the_page(group, device):
    """((out, this rank's heads of it), number of groups of heads, the rank's) of the page."""
    names = dict(rank=dist.get_rank(group), world_size=dist.get_world_size(group), init_method="")
    with mock.patch.object(dist, "init_process_group"):  # which has been done
        found = run_page("distributed.md", **names)
    return on_cpu((found["out"], found["own_out"])), found["heads_over"], found["part"]


def test_distributed_page(ranks):
    """Its examples run, and both ways of spreading give the same."""
    results = ranks.run(run_the_page)
    first = results[0][0][0]
    assert first.abs().amax() > 0
    for (out, own_out), heads_over, part in results:
        assert_same_bits(out, first)
        own = out.chunk(heads_over, 1)[part]
        torch.testing.assert_close(own_out, own, atol=1e-2, rtol=1e-2)
