"""decode of DTensors whose heads are sharded: two processes, each with its own heads."""

import os
import socket

import pytest
import torch

import leanattn

RANKS = 2

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch has no gloo",
)


def test_dtensor_with_sharded_heads():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(check, (port,), RANKS)


def check(rank, port):
    """Everything, in one of the processes."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        check_heads(rank)
    finally:
        torch.distributed.destroy_process_group()


def check_heads(rank):
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (RANKS,))

    def sharded(tensor, dim):
        return DTensor.from_local(tensor.chunk(RANKS, dim)[rank].contiguous(), mesh, [Shard(dim)])

    def replicated(tensor):
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 8, 16), torch.randn(2, 9, 4, 16), torch.randn(2, 9, 4, 8)
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    sinks, slopes = torch.randn(8), torch.rand(2, 8)
    options = dict(window_left=4, return_lse=True)
    expected = leanattn.decode(q, k, v, lengths, sinks=sinks, alibi_slopes=slopes, **options)
    out = leanattn.decode(
        sharded(q, 2), sharded(k, 2), sharded(v, 2), replicated(lengths), sinks=sharded(sinks, 0),
        alibi_slopes=sharded(slopes, 1), **options,
    )  # fmt: skip
    for one, other in zip(out, expected):
        assert one.placements == (Shard(2),)
        torch.testing.assert_close(one.full_tensor(), other)

    # Paged, one query; a cache of one head stays whole beside sharded queries.
    pool, table = torch.randn(6, 4, 4, 16), torch.tensor([[5, 1, 2], [0, 3, 4]], dtype=torch.int32)
    out = leanattn.decode(
        sharded(q[:, 0], 1), sharded(pool, 2), sharded(pool, 2), replicated(lengths),
        replicated(table),
    )  # fmt: skip
    assert out.placements == (Shard(1),)
    torch.testing.assert_close(
        out.full_tensor(), leanattn.decode(q[:, 0], pool, pool, lengths, table)
    )
    out = leanattn.decode(sharded(q, 2), replicated(k[:, :, :1]), replicated(v[:, :, :1]))
    assert out.placements == (Shard(2),)
    torch.testing.assert_close(out.full_tensor(), leanattn.decode(q, k[:, :, :1], v[:, :, :1]))

    # Three KV heads over two ranks would part from their groups.
    q, k, v = q[:, :, :6], k[:, :, :3], v[:, :, :3]
    out = leanattn.decode(sharded(q, 2), replicated(k), replicated(v))
    assert out.placements == (Replicate(),)
    torch.testing.assert_close(out.full_tensor(), leanattn.decode(q, k, v))
    with pytest.raises(RuntimeError, match="sinks must be sharded as the heads"):
        leanattn.decode(sharded(q, 2), replicated(k), replicated(v), sinks=sharded(sinks[:6], 0))
