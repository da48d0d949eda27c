"""Processes that stay, one a rank, for tests over torch.distributed: starting them is slow."""

import datetime
import multiprocessing
import traceback

import torch
import torch.distributed as dist

TIME_OUT = 20.0  # seconds that a group waits for a rank


class Ranks:
    """`size` processes in one group, and in smaller ones of the first 2, 3, ..."""

    def __init__(self, size, backend, folder):
        context = multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (rank, size, backend, str(folder / "store"), there)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            self.connections.append(here)
            self.processes.append(process)

    def run(self, function, *arguments, size=None):
        """What `function(group, device, *arguments)` gives on each of the first `size` ranks.

        Raises what the first of them raised; the function is one that a new process can import.
        """
        connections = self.connections[:size]
        for connection in connections:
            connection.send((function, len(connections), arguments))
        replies = [self.receive(connection) for connection in connections]
        for rank, (result, error) in enumerate(replies):
            assert error is None, f"on rank {rank}:\n{error}"
        return [result for result, _ in replies]

    def receive(self, connection):
        assert connection.poll(10 * TIME_OUT), "a rank does not answer"
        return connection.recv()

    def close(self):
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(2)
            process.kill()


def serve(rank, size, backend, store, connection):
    """Runs what comes, until the connection is closed."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=TIME_OUT),
    )  # fmt: skip
    groups = {n: dist.new_group(range(n)) for n in range(1, size)} | {size: dist.group.WORLD}
    while True:
        try:
            function, members, arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = function(groups[members], device, *arguments), None
        except Exception:
            reply = None, traceback.format_exc()
        connection.send(reply)


def on(device, call):
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in call.items()}


def on_cpu(tensors):
    return tuple(tensor.cpu() for tensor in tensors)
