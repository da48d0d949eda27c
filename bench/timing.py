"""How times are taken: CUDA graphs of one call for each input set, warm, all implementations in
turn, so that clocks and other tenants treat them alike."""

import statistics
import time
from dataclasses import dataclass

import torch

WARM_SECONDS = 0.025  # clocks and caches settle; without it floors came out up to 13% too high
MIN_CALLS = 4  # in a graph, so that launching the graph is a small part
MAX_ROUNDS, MIN_ROUNDS = 21, 5
SECONDS_EACH = 0.06  # that an implementation's rounds may take, once it has MIN_ROUNDS


@dataclass
class Times:
    """Microseconds a call; quartiles over rounds."""

    median: float
    quartile1: float
    quartile3: float
    rounds: int
    calls: int  # in a round

    @classmethod
    def of(cls, samples, calls):
        low, _, high = (
            statistics.quantiles(samples, method="inclusive") if len(samples) > 1 else samples * 3
        )
        return cls(statistics.median(samples), low, high, len(samples), calls)


class CudaGraph:
    """`call(inputs)` for each input set in turn, MIN_CALLS times or more, captured."""

    def __init__(self, call, sets):
        rotation = [sets[i % len(sets)] for i in range(max(len(sets), MIN_CALLS))]
        self.calls = len(rotation)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for inputs in rotation[:3]:  # first calls load kernels, pick plans, allocate
                call(inputs)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for inputs in rotation:
                call(inputs)
        self.replay = self.graph.replay


def graph_times(graphs):
    """{name: Times} of {name: CudaGraph}. A round begins with a replay that is not timed: the GPU
    is at work, then, before the host has queued the rest, and no launch stands in any time."""
    seconds = {name: _once(graph) for name, graph in graphs.items()}
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_SECONDS:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    rounds = {name: _rounds(seconds[name]) for name in graphs}
    samples = {name: [] for name in graphs}
    for i in range(max(rounds.values())):
        events = {}
        next(iter(graphs.values())).replay()
        for name, graph in graphs.items():
            if i < rounds[name]:
                events[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[name][0].record()
                graph.replay()
                events[name][1].record()
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            samples[name].append(start.elapsed_time(end) * 1e3 / graphs[name].calls)
    return {name: Times.of(samples[name], graphs[name].calls) for name in graphs}


def _once(graph):
    torch.cuda.synchronize()
    start = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _rounds(seconds):
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS_EACH / seconds)))


def cpu_times(calls, sets):
    """{name: Times} of {name: call(inputs)} on the CPU, to try the bench without a GPU."""
    samples = {name: [] for name in calls}
    for _ in range(MIN_ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for inputs in sets:
                call(inputs)
            samples[name].append((time.perf_counter() - start) * 1e6 / len(sets))
    return {name: Times.of(samples[name], len(sets)) for name in calls}


def step_microseconds(step, sets, device, seconds=0.005):
    """Of one eager `step(inputs)`, by the wall clock from the first to the end of the last, host
    included; the median of three loops."""

    def loop(count):
        start = time.perf_counter()
        for i in range(count):
            step(sets[i % len(sets)])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    count = max(3, min(100, int(seconds / loop(3))))
    return statistics.median(loop(count) for _ in range(3)) * 1e6
