"""torch.vmap over decode: one call, the same results as one call after another, and no warning."""

import pytest
import torch
from cases import int32
from torch.utils._python_dispatch import TorchDispatchMode

import leanattn

MAPPED, BATCH, TOKENS = 3, 2, 9


class Calls(TorchDispatchMode):
    """The calls of leanattn's ops, by name, and the largest tensor that anything else makes."""

    def __init__(self):
        super().__init__()
        self.ops, self.largest = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op.namespace == "leanattn":
            self.ops.append(op.name())
        elif isinstance(result, torch.Tensor) and not op.is_view:
            self.largest = max(self.largest, result.numel())
        return result


def numbers(*shape, dtype=torch.float16):
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def check(device, function, arguments, dims=None, calls=1):
    """vmap's result against a loop's. Returns what was seen in between."""
    arguments = [a.to(device) for a in arguments]
    dims = [0] * len(arguments) if dims is None else dims
    rows = [
        [a if dim is None else a.select(dim, i) for a, dim in zip(arguments, dims)]
        for i in range(MAPPED)
    ]
    expected = [function(*row) for row in rows]
    with Calls() as seen:
        actual = torch.vmap(function, tuple(dims))(*arguments)
    if isinstance(actual, torch.Tensor):
        actual, expected = (actual,), [(each,) for each in expected]
    for one, *others in zip(actual, *expected):
        torch.testing.assert_close(one, torch.stack(others), rtol=2e-3, atol=1e-3)
    assert len(seen.ops) == calls
    return seen


Q = numbers(MAPPED, BATCH, 2, 4, 16)
K, V = numbers(MAPPED, BATCH, TOKENS, 2, 16), numbers(MAPPED, BATCH, TOKENS, 2, 8)
LENGTHS = int32([[9, 4], [1, 0], [5, 7]], "cpu")
POOL = numbers(MAPPED, 4, 5, 2, 16)
TABLE = int32([[[0, 1], [1, 2]], [[3, 3], [-5, 99]], [[1, 0], [2, 2]]], "cpu")


def with_lse(q, k, v, lengths):
    return leanattn.decode(q, k, v, lengths, return_lse=True)


def paged(q, k, lengths, table):
    return leanattn.decode(q, k, k, lengths, table)


CASES = {
    "all": (with_lse, (Q, K, V, LENGTHS), None),
    "other dimensions": (with_lse, (Q.movedim(0, 3), K.movedim(0, 1), V.movedim(0, 3), LENGTHS.T),
                         (3, 1, 3, 1)),
    "one cache": (with_lse, (Q, K[0], V[0], LENGTHS), (0, None, None, 0)),
    "k alone": (with_lse, (Q[0], K, V[0], LENGTHS[0]), (None, 0, None, None)),
    "lengths alone": (with_lse, (Q[0], K[0], V[0], LENGTHS), (None, None, None, 0)),
    "q 3-D": (lambda q, k: leanattn.decode(q, k, k, window_left=3), (Q[:, :, 0], K), None),
    "paged": (paged, (Q, POOL[0], LENGTHS, TABLE), (0, None, 0, 0)),
    "paged, pools": (paged, (Q, POOL, LENGTHS, TABLE), None),
    "paged, one table": (paged, (Q, POOL, LENGTHS, TABLE[0]), (0, 0, 0, None)),
    "empty cache": (lambda q, k: leanattn.decode(q, k, k), (Q, K[0, :, :0]), (0, None)),
    **{
        f"slopes {tuple(slopes.shape)} {dim}": (
            lambda q, k, slopes: leanattn.decode(q, k, k, alibi_slopes=slopes),
            (Q, K, slopes), (0, 0, dim),
        )
        for slopes, dim in (
            (torch.rand(4), None), (torch.rand(BATCH, 4), None), (torch.rand(MAPPED, 4), 0),
            (torch.rand(MAPPED, BATCH, 4), 0),
        )
    },
    **{
        f"scales {tuple(scale.shape)} {dim}": (
            lambda q, k, scale: leanattn.decode(q, k, k, k_scale=scale, v_scale=scale),
            (Q[..., :16], K.to(torch.float8_e4m3fn), scale), (0, 0, dim),
        )
        for scale, dim in (
            (torch.rand(1), None), (torch.rand(2), None), (torch.rand(BATCH, 2), None),
            (torch.rand(MAPPED), 0), (torch.rand(MAPPED, 1), 0), (torch.rand(MAPPED, 2), 0),
            (torch.rand(MAPPED, BATCH, 2), 0),
        )
    },
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CASES)
def test_vmap_is_one_call(name, device, capfd):
    function, arguments, dims = CASES[name]
    check(device, function, arguments, dims)
    assert "performance drop" not in capfd.readouterr().err  # torch warns past Python


@pytest.mark.parametrize("name", ["ragged", "sinks"])
def test_vmap_where_there_must_be_several(name, device):
    """One call has one set of sinks, and queries of one kind."""
    offsets = int32([0, 1, 4], device)
    if name == "ragged":
        arguments = (numbers(MAPPED, 4, 4, 16), K)
        check(device, lambda q, k: leanattn.decode(q, k, k, cu_seqlens_q=offsets), arguments,
              calls=MAPPED)  # fmt: skip
    else:
        arguments = (Q, K, V, LENGTHS, torch.randn(MAPPED, 4))
        check(device, lambda q, k, v, n, s: leanattn.decode(q, k, v, n, sinks=s, return_lse=True),
              arguments, calls=MAPPED)  # fmt: skip


def test_vmap_copies_no_shared_cache(device):
    """Nor a mapped one that is a longer batch."""
    for dims, cache in (
        (None, numbers(BATCH, 500, 2, 16)),
        (0, numbers(MAPPED, BATCH, 500, 2, 16)),
    ):
        seen = check(device, lambda q, k: leanattn.decode(q, k, k), (Q, cache), (0, dims))
        assert seen.largest < cache.numel() // 4


def test_vmap_in_vmap_and_around_nothing(device):
    """Levels of mapping, of which one may map nothing that the op is given."""
    q, k = (x.to(device) for x in (Q, K))
    nested = torch.vmap(torch.vmap(lambda q, k: leanattn.decode(q, k, k)))(
        torch.stack((q, -q)), torch.stack((k, 2 * k))
    )
    expected = [leanattn.decode(s * q[i], t * k[i], t * k[i]) for s, t in ((1, 1), (-1, 2))
                for i in range(MAPPED)]  # fmt: skip
    torch.testing.assert_close(nested.flatten(0, 1), torch.stack(expected), rtol=2e-3, atol=1e-3)
    alone = torch.vmap(lambda x: x + leanattn.decode(q[0], k[0], k[0]))(torch.zeros_like(q))
    torch.testing.assert_close(alone[1], leanattn.decode(q[0], k[0], k[0]))


def test_no_derivative_under_vmap(device):
    with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
        torch.vmap(torch.func.grad(lambda q, k: leanattn.decode(q, k, k).sum()))(
            Q.to(device), K.to(device)
        )
