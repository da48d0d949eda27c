"""The library's own counters, csrc/cuda/counters.h: calls that are given none need no memset, and
whatever may run at once has counters of its own."""

import gc
import threading

import pytest
import torch
from cases import check, launched, make_case, run
from reference import assert_close, assert_same_bits

import leanattn

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuts")]


@pytest.fixture(params=["stream_k"])
def cuts(request, device, force_units, monkeypatch):
    """Items are cut, and their partials go through global memory."""
    monkeypatch.setenv("LEANATTN_LAYOUT", request.param)
    if request.param == "stream_k":
        force_units(5)


def cut_case(device, seed=1, **options):
    return make_case(device, torch.float16, lengths=(700, 5, 300), heads=(2, 1), seed=seed,
                     **options)  # fmt: skip


class Captured:
    """A graph of calls, one a case, and what they should give, by default what they give now."""

    def __init__(self, *cases, expected=None, **options):
        self.cases = cases  # a graph keeps no tensors alive
        self.expected = expected or [run(case) for case in cases]
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, **options):
            self.results = [run(case) for case in cases]

    def replay(self):
        self.graph.replay()
        return self

    def check(self):
        torch.cuda.synchronize()
        for (out, lse), (expected_out, expected_lse) in zip(self.results, self.expected):
            assert_same_bits(out, expected_out)
            assert_same_bits(lse, expected_lse)
            out.fill_(7.0)
            lse.fill_(7.0)
        torch.cuda.synchronize()  # before a replay on another stream


@pytest.mark.parametrize("cuts", ["stream_k", "teams:3"], indirect=True)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_no_memset(batch_invariant, device):
    case = cut_case(device)
    out, lse = run(case, batch_invariant=batch_invariant)
    assert_close(out, lse, **case)
    names = launched(lambda: run(case, batch_invariant=batch_invariant))
    assert len(names) == 1 and not names[0].startswith("Memset"), names


def test_no_memset_in_a_graph(device):
    captured = Captured(cut_case(device), cut_case(device, seed=2))
    captured.replay().check()
    names = launched(captured.graph.replay)
    assert len(names) == 2 and not any(name.startswith("Memset") for name in names), names


def test_other_lengths_after_each_other(device):
    """Each launch leaves zeros, whatever it shared out."""
    case = cut_case(device)
    for lengths in ((700, 5, 300), (0, 0, 0), (1, 1, 1), (737, 737, 737), (128, 0, 699)):
        case["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        check({**case, "k_cache": case["k_cache"].nan_to_num(1.0),
               "v_cache": case["v_cache"].nan_to_num(1.0)})  # fmt: skip


def test_more_than_a_set_holds(device, force_units):
    """Rarely does a call need so many; then they are in its workspace, and a memset comes first."""
    force_units(1100)
    case = make_case(device, torch.float16, lengths=(3,) * 1099 + (900,), heads=(1, 1),
                     dims=(8, 8), capacity=900)  # fmt: skip
    out, lse = run(case)
    assert_close(out, lse, **case)
    names = launched(lambda: run(case))
    assert sorted(name.startswith("Memset") for name in names) == [False, True], names


# --- Streams -------------------------------------------------------------------------------------


def test_streams_at_once(device):
    """More of them than torch has streams, so that some meet again."""
    cases = [cut_case(device, seed=seed) for seed in range(40)]
    expected = [run(case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results = []
    for _ in range(3):
        for case, stream in zip(cases, streams):
            with torch.cuda.stream(stream):
                results.append(run(case))
    torch.cuda.synchronize()
    for i, (out, lse) in enumerate(results):
        assert_same_bits(out, expected[i % 40][0])
        assert_same_bits(lse, expected[i % 40][1])


def test_threads_at_once_one_of_them_capturing(device):
    """Each on streams of its own, which it has counters for as it begins."""
    cases = [cut_case(device, seed=seed) for seed in range(5)]
    expected = [run(case) for case in cases]
    graphs, results = [], [[] for _ in cases]
    torch.cuda.synchronize()

    def call(i):
        for _ in range(10):
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                results[i].append(run(cases[i]))
            stream.synchronize()

    def capture():
        stream = torch.cuda.Stream()
        for _ in range(5):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = run(cases[0])
            graphs.append((graph, result))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(1, 5)]
    threads.append(threading.Thread(target=capture))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for graph, result in graphs:
        graph.replay()
        results[0].append(result)
    torch.cuda.synchronize()
    assert [len(found) for found in results] == [5, 10, 10, 10, 10]
    for found, (out, lse) in zip(results, expected):
        for again, lse_again in found:
            assert_same_bits(again, out)
            assert_same_bits(lse_again, lse)


@pytest.mark.not_emulated
def test_second_gpu(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    on_cpu = cut_case("cpu")
    case = {name: value.to("cuda:1") for name, value in on_cpu.items()}
    leanattn.warmup("cuda:1")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream("cuda:1")):
        captured = run(case)
    names = launched(lambda: run(case))
    assert len(names) == 1, names
    graph.replay()
    torch.cuda.synchronize(1)
    for out, lse in (captured, run(case)):
        assert_close(out.cpu(), lse.cpu(), **on_cpu)


# --- Graphs --------------------------------------------------------------------------------------


def test_graphs_of_one_stream_at_once(device, repeats):
    """Replayed on two streams, with eager calls on the one that they were captured on."""
    stream = torch.cuda.Stream()
    graphs = [Captured(*[cut_case(device, seed=seed + i) for i in range(4)], stream=stream)
              for seed in (0, 10)]  # fmt: skip
    case = cut_case(device, seed=20)
    expected, expected_lse = run(case)
    others = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(repeats):
        results = []
        for _ in range(5):
            for other, captured in zip(others, graphs):
                with torch.cuda.stream(other):
                    captured.replay()
            with torch.cuda.stream(stream):
                results.append(run(case))
        for captured in graphs:
            captured.check()
        for out, lse in results:
            assert_same_bits(out, expected)
            assert_same_bits(lse, expected_lse)


def test_branches_of_a_graph_at_once(device, repeats):
    """Two streams in one capture."""
    cases = [[cut_case(device, seed=seed + i) for i in range(3)] for seed in (0, 10)]
    expected = [[run(case) for case in branch] for branch in cases]
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        results = [[run(case) for case in cases[0]]]
        with torch.cuda.stream(side):
            results.append([run(case) for case in cases[1]])
        torch.cuda.current_stream().wait_stream(side)
    for _ in range(repeats):
        graph.replay()
        torch.cuda.synchronize()
        for branch, expected_branch in zip(results, expected):
            for (out, lse), (expected_out, expected_lse) in zip(branch, expected_branch):
                assert_same_bits(out, expected_out)
                assert_same_bits(lse, expected_lse)


def test_a_graph_goes_and_another_comes(device, repeats):
    """What it leaves, the next may have, and no other."""
    stream = torch.cuda.Stream()
    graphs = [Captured(cut_case(device, seed=seed), stream=stream) for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in graphs]
    for seed in range(4, 12):
        graphs.pop(seed % 4)
        gc.collect()
        graphs.append(Captured(cut_case(device, seed=seed), stream=stream))
        torch.cuda.synchronize()
        for _ in range(repeats):
            for other, captured in zip(streams, graphs):
                with torch.cuda.stream(other):
                    captured.replay()
        for captured in graphs:
            captured.check()


def test_more_graphs_than_a_slab_has_sets(device):
    """New memory, in the middle of a capture, that the graph knows nothing of."""
    case = cut_case(device)
    leanattn.warmup(torch.device(device))
    expected = [run(case)]
    graphs = [Captured(case, expected=expected) for _ in range(300)]
    for captured in graphs:
        captured.replay().check()
    assert len(launched(graphs[-1].graph.replay)) == 1


def test_many_graphs_after_each_other(device):
    """Their counters come back: all of them would fill four megabytes."""
    case = cut_case(device)
    expected = [run(case)]
    taken = []
    for i in range(1000):
        captured = Captured(case, expected=expected)
        if i % 100 == 0:
            captured.replay().check()
        del captured
        if i in (20, 999):
            gc.collect()
            torch.cuda.synchronize()
            taken.append(torch.ops.leanattn.counter_bytes(0))
    assert taken[0] == taken[1] > 0


PROGRAM = """
import os
import torch, leanattn

q = torch.randn(2, 1, 4, 64, device="cuda").half()
k = torch.randn(2, 3000, 2, 64, device="cuda").half()
lengths = torch.tensor([3000, 17], dtype=torch.int32, device="cuda")
decode = torch.ops.leanattn.decode
{first}
os.environ["LEANATTN_NUM_UNITS"] = "40"
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = decode(q, k, k, lengths)
expected = decode(q, k, k, lengths, counters=leanattn.counters("cuda"))
for _ in range(3):
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(decode(q, k, k, lengths), expected)
"""


@pytest.mark.not_emulated
@pytest.mark.parametrize(
    "first",
    [
        'leanattn.warmup("cuda")',
        'os.environ["LEANATTN_NUM_UNITS"] = "1"; decode(q, k, k, lengths)',
    ],
    ids=["warm", "cold"],
)
def test_the_first_call_that_needs_any_is_captured(first, device, run_python, monkeypatch):
    """In a fresh process, after warmup or, with the kernel alone loaded, without."""
    monkeypatch.delenv("LEANATTN_LAYOUT")
    process = run_python("-c", PROGRAM.format(first=first))
    assert process.returncode == 0, process.stderr


# --- Whose they are, where that can be seen ------------------------------------------------------


def test_one_set_a_stream(device, emulated_gpu):
    own = emulated_gpu.own_counters
    first = own()
    assert first and own() == own(1024) == first
    assert own(1025) is None
    streams = [torch.cuda.Stream() for _ in range(20)]
    sets = {first}
    for stream in streams:
        with torch.cuda.stream(stream):
            assert own() == own()
            sets.add(own())
    assert len(sets) == 21
    assert all(abs(a - b) >= 4096 for a in sets for b in sets if a != b)
    assert own() == first


def test_a_new_stream_with_an_old_handle(device, emulated_gpu):
    """The old one's work may not have ended."""
    stream = torch.cuda.Stream()
    handle = stream._handle.value
    with torch.cuda.stream(stream):
        old = emulated_gpu.own_counters()
    del stream
    stream = torch.cuda.Stream()
    assert stream._handle.value == handle
    with torch.cuda.stream(stream):
        assert emulated_gpu.own_counters() != old


def test_one_set_a_capture_and_stream(device, emulated_gpu):
    own = emulated_gpu.own_counters
    stream, side = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        eager = own()

    def capture():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            on_stream = own()
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                on_side = own()
            assert own() == on_stream
        return graph, [on_stream, on_side]

    first, first_sets = capture()
    second, second_sets = capture()
    assert len({eager, *first_sets, *second_sets}) == 5
    with torch.cuda.stream(stream):
        assert own() == eager
    del first
    third, third_sets = capture()
    assert sorted(third_sets) == sorted(first_sets)
    del second, third


def test_without_memory(device, emulated_gpu):
    """The call has a memset; with memory again, none."""
    case = cut_case(device)
    expected, expected_lse = run(case)
    streams = []
    with emulated_gpu.full():
        while True:
            streams.append(torch.cuda.Stream())
            with torch.cuda.stream(streams[-1]):
                if not emulated_gpu.own_counters():
                    break
        with torch.cuda.stream(streams[-1]):
            assert launched(lambda: run(case)) == ["Memset", "kernel"]
            out, lse = run(case)
    with torch.cuda.stream(streams[-1]):
        assert launched(lambda: run(case)) == ["kernel"]
        again, lse_again = run(case)
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)
    assert_same_bits(again, expected)
    assert_same_bits(lse_again, expected_lse)


def test_very_many_streams(device, emulated_gpu):
    """Those that come late do without, others and graphs do not; and memory has a bound."""

    def own():
        return emulated_gpu.own_counters(device=1)

    free, _ = torch.cuda.mem_get_info()
    first = own()
    sets = {first}
    for _ in range(4095):
        with torch.cuda.stream(torch.cuda.Stream()):
            sets.add(own())
    assert len(sets) == 4096 and None not in sets
    with torch.cuda.stream(torch.cuda.Stream()) as stream:
        assert own() is None
    assert own() == first
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        assert own() not in {None, *sets}
    assert free - torch.cuda.mem_get_info()[0] == 17 << 20
