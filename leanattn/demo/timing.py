"""How the demo takes times: warm, and the median of many runs."""

import statistics
import time

import torch

_SECONDS = 4.0  # that all calls together may take on the CPU
_CALLS_A_GRAPH = 5
EAGER = "eager calls"


def median_seconds(calls, device):
    """For each function of `calls`, the seconds that one call of it takes on `device`, and in words
    how they were taken: [(seconds, words)]."""
    return [_time_cuda(call) for call in calls] if device.type == "cuda" else _time_cpu(calls)


def _time_cpu(calls):
    """In turn, so that whatever else the machine does falls on all of them."""
    for call in calls:
        call()
    times = [[] for _ in calls]
    began = time.perf_counter()
    while len(times[0]) < 5 or (time.perf_counter() - began < _SECONDS and len(times[0]) < 51):
        for call, taken in zip(calls, times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [(statistics.median(taken), f"median of {len(taken)} runs") for taken in times]


def _time_cuda(call):
    """CUDA events around replays of a graph of several calls, so that the host costs nothing; after
    25 ms of replays, which clocks and caches need to settle."""
    replay, how = _graph_of(call)
    began = time.perf_counter()
    while time.perf_counter() - began < 0.025:
        replay()
        torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(21):
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / _CALLS_A_GRAPH)
    return statistics.median(times), how


def _graph_of(call):
    def calls():
        for _ in range(_CALLS_A_GRAPH):
            call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            calls()
    except RuntimeError:  # something in the call cannot be captured
        return calls, EAGER
    return graph.replay, f"median of 21 replays of a CUDA graph of {_CALLS_A_GRAPH} calls"
