"""Times one sequence over several GPUs: leanattn.distributed.decode on 1, 2, .. GPUs of a host, and
what it is made of.

    python -m bench.distributed --gpus 1,2 --csv distributed.csv

In CUDA graphs of nothing else, as bench.decode; a time is that of the slowest rank. bench/README.md
says what the names mean.
"""

import argparse
import csv
import math
import os
import statistics
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import torch.multiprocessing

import leanattn
import leanattn.distributed
from bench.provenance import provenance
from bench.timing import CudaGraph

HEAD_DIM = 128
HEADS = {"32/8": (32, 8), "8/1": (8, 1)}
TOKENS = {"128k": 2**17, "1M": 2**20, "4M": 2**22}
MANY_RANKS = (8, 64)  # whose states one GPU merges too, for what they would give on paper
ROUNDS = 11
ROTATED_BYTES = 2**28  # input sets together, so that nothing is read from L2
COLUMNS = ["gpus", "heads", "tokens", "mib_a_gpu", "name", "us", "us_quartile1", "us_quartile3",
           "rounds", "calls", "error"]  # fmt: skip


class OneShot:
    """An exchange through memory that all GPUs of a host see: each writes its state to its own,
    and copies the others' from theirs. No multicast.

    `safe`: a second barrier keeps a rank from writing its next state before the others have read
    this one; it stands beside the merge, on a stream of its own. Without it two buffers take turns,
    and no two calls that follow each other, in any graph and from one graph to the next, may use
    the same.
    """

    def __init__(self, size, group, device, safe):
        self.safe, self.ranks, self.turn = safe, dist.get_world_size(group), 0
        self.beside = torch.cuda.Stream(device)
        self.buffers = []
        for _ in range(1 if safe else 2):
            own = symmetric_memory.empty(size, dtype=torch.float32, device=device)
            handle = symmetric_memory.rendezvous(own, group)
            parts = [handle.get_buffer(r, (size,), torch.float32) for r in range(self.ranks)]
            self.buffers.append((own, handle, parts))

    def next_own(self):
        self.turn = (self.turn + 1) % len(self.buffers)
        return self.buffers[self.turn][0]

    def gather(self, use):
        """use([ranks, size] of everyone's states)"""
        _, handle, parts = self.buffers[self.turn]
        handle.barrier(channel=0)
        everyones = torch.stack(parts)
        if not self.safe:
            return use(everyones)
        stream = torch.cuda.current_stream()
        self.beside.wait_stream(stream)
        with torch.cuda.stream(self.beside):
            handle.barrier(channel=1)
        result = use(everyones)
        stream.wait_stream(self.beside)
        return result


class Case:
    """One rank's inputs, and the calls that are timed."""

    def __init__(self, heads, tokens, group, device):
        self.group, self.device = group, device
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.heads_q, heads_kv = heads
        share = tokens // self.ranks
        self.bytes = 2 * share * heads_kv * HEAD_DIM * 2
        count = max(1, math.ceil(ROTATED_BYTES / self.bytes))
        new = dict(dtype=torch.bfloat16, device=device)
        caches = torch.empty(count, 2, 1, share, heads_kv, HEAD_DIM, **new)
        generator = torch.Generator(device).manual_seed(self.rank)
        for cache in caches:
            cache.normal_(generator=generator)
        generator = torch.Generator(device).manual_seed(99)  # the same on all ranks
        self.q = torch.randn(1, self.heads_q, HEAD_DIM, generator=generator, **new)
        self.sets = [tuple(cache) for cache in caches]
        self.lengths = torch.full((1,), tokens, dtype=torch.int32, device=device)
        self.own_lengths = torch.full((1,), share, dtype=torch.int32, device=device)
        self.sink = torch.zeros(1024, dtype=torch.int32, device=device)
        self.state = leanattn.distributed.State(self.q.shape[:-1], HEAD_DIM)
        self.own = torch.zeros(self.state.size, device=device)
        self.everyones = torch.zeros(self.ranks, self.state.size, device=device)
        self.one_shots = {}
        if self.ranks > 1:
            for name, safe in (("one-shot", True), ("one-shot-1", False)):
                self.one_shots[name] = OneShot(self.state.size, group, device, safe)

    def calls(self):
        """{name: call(k and v)}"""
        calls = {"floor": self.floor, "decode": self.decode}
        if self.ranks == 1:
            for ranks in MANY_RANKS:
                everyones = torch.zeros(ranks, self.state.size, device=self.device)
                calls[f"merge-{ranks}"] = lambda _, states=everyones: self.merge_all(states)
            return calls
        calls |= {"decode-plain": self.decode_plain, "nccl": self.nccl, "merge": self.merge,
                  "whole": self.whole}  # fmt: skip
        for name, exchange in self.one_shots.items():
            calls[name] = lambda _, exchange=exchange: self.one_shot(exchange)
            calls[f"whole-{name}"] = lambda kv, exchange=exchange: self.whole_one_shot(kv, exchange)
        return calls

    def floor(self, kv):
        torch.ops.leanattn.read_floor(*kv, self.sink)

    def decode(self, kv):
        if self.ranks == 1:
            return leanattn.decode(self.q, *kv, self.lengths)
        return self.decode_to(self.own, kv)

    def decode_to(self, own, kv):
        out, lse = self.state.parts(own)
        place = leanattn.distributed.placement(kv[0], group=self.group)
        torch.ops.leanattn.decode_with_lse_out(self.q, *kv, self.lengths, **place, out=out, lse=lse)

    def decode_plain(self, kv):
        return leanattn.decode(self.q, *kv, self.own_lengths, return_lse=True)

    def nccl(self, _):
        return leanattn.distributed.all_gather(self.own, self.ranks, self.group)

    def merge(self, _):
        return self.merge_all(self.everyones)

    def merge_all(self, everyones):
        return leanattn.merge_states(*self.state.parts(everyones), dtype=self.q.dtype)

    def whole(self, kv):
        return leanattn.distributed.decode(self.q, *kv, self.lengths, group=self.group)

    def one_shot(self, exchange):
        exchange.next_own()
        return exchange.gather(lambda everyones: everyones)

    def whole_one_shot(self, kv, exchange):
        self.decode_to(exchange.next_own(), kv)
        return exchange.gather(self.merge_all)[0]

    def truth(self):
        """Of the first set in fp32, a head at a time: states of all ranks, merged here."""
        k, v = (cache[0].float() if self.bytes < 2**28 else cache[0] for cache in self.sets[0])
        group_size = self.heads_q // k.shape[1]
        outs, lses = [], []
        for head in range(k.shape[1]):
            q = self.q[0, head * group_size : (head + 1) * group_size].float()
            scores = q @ k[:, head].float().T / HEAD_DIM**0.5
            lses.append(scores.logsumexp(-1))
            outs.append(scores.softmax(-1) @ v[:, head].float())
        own = torch.cat([torch.cat(outs), torch.cat(lses)[:, None]], 1).contiguous()
        everyones = own.new_empty(self.ranks * own.shape[0], own.shape[1])
        dist.all_gather_into_tensor(everyones, own, group=self.group)
        everyones = everyones.unflatten(0, (self.ranks, -1))
        weights = everyones[..., -1].softmax(0)[..., None]
        return (weights * everyones[..., :-1]).sum(0)[None]


def error_of(out, truth):
    """Norm of the difference over the norm."""
    return float((out.float() - truth).norm() / truth.norm())


def rank_times(graph):
    """[us a call], of ROUNDS; a replay that is not timed before each keeps the ranks together."""
    samples = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / graph.calls)
    return samples


def work(rank, ranks, options, store, path):
    """All shapes on one GPU of `ranks`; rank 0 writes the rows."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=ranks,
                            device_id=device)  # fmt: skip
    group = dist.group.WORLD
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        for heads in options.heads:
            for tokens in options.tokens:
                case = Case(HEADS[heads], TOKENS[tokens], group, device)
                for row in measure(case):
                    row |= dict(gpus=ranks, heads=heads, tokens=tokens,
                                mib_a_gpu=case.bytes >> 20)  # fmt: skip
                    if rank == 0:
                        writer.writerow(row)
                        file.flush()
                        print(f"{ranks} GPUs {heads:>5} {tokens:>5} {row['name']:<17}"
                              f"{row['us']:>9} us  {row['error']}", flush=True)  # fmt: skip
                del case
                torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()


def measure(case):
    truth = case.truth()
    for name, call in case.calls().items():
        error = ""
        if name.startswith("whole") or name == "decode" and case.ranks == 1:
            error = error_of(call(case.sets[0]), truth)
            assert error < 0.02, f"{name} is off by {error}"
            error = f"{error:.2g}"
        graph = CudaGraph(call, case.sets)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        dist.barrier()
        samples = torch.tensor(rank_times(graph), device=case.device)
        dist.all_reduce(samples, dist.ReduceOp.MAX)
        low, median, high = statistics.quantiles(samples.tolist(), method="inclusive")
        del graph
        yield dict(name=name, us=f"{median:.2f}", us_quartile1=f"{low:.2f}",
                   us_quartile3=f"{high:.2f}", rounds=ROUNDS,
                   calls=max(len(case.sets), 4), error=error)  # fmt: skip


def some_of(table):
    def parse(text):
        names = text.split(",")
        if unknown := set(names) - set(table):
            raise argparse.ArgumentTypeError(f"{unknown} are not among {', '.join(table)}")
        return names

    return parse


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", default="1,2", metavar="N,...",
                        type=lambda text: [int(n) for n in text.split(",")])  # fmt: skip
    parser.add_argument("--heads", type=some_of(HEADS), default=list(HEADS), metavar="Hq/Hkv,...")
    parser.add_argument("--tokens", type=some_of(TOKENS), default=["128k", "1M"], metavar="N,...")
    parser.add_argument("--csv", required=True, help="where the rows go")
    options = parser.parse_args()
    if max(options.gpus) > torch.cuda.device_count():
        sys.exit(f"bench.distributed: {max(options.gpus)} GPUs are wanted, torch sees "
                 f"{torch.cuda.device_count()}")  # fmt: skip
    with open(options.csv, "w", newline="") as file:
        for key, value in provenance(torch.device("cuda", 0)).items():
            file.write(f"# {key}: {value}\n")
        csv.DictWriter(file, COLUMNS).writeheader()
    for ranks in options.gpus:
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            torch.multiprocessing.spawn(work, (ranks, options, store, options.csv), ranks)


if __name__ == "__main__":
    main()
