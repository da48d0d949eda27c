"""The CUDA kernels of append_kv, rope_append_kv and merge_states, thread by thread on a CPU, beside
the CPU implementation; emulator/emulator.h says what this can show."""

import pytest
import torch
from cases import int32, offsets

HEADS, HEADS_Q, DIM, DIM_V = 3, 6, 64, 40


@pytest.fixture(scope="module")
def append(load_emulated):
    return load_emulated("emulated_append").append


@pytest.fixture(scope="module")
def merge(load_emulated):
    return load_emulated("emulated_merge").merge


def as_numbers(tensor):
    kind = torch.uint8 if tensor.element_size() == 1 else torch.uint16
    return tensor.view(kind).numpy()


def assert_same_memory(a, b):
    assert (as_numbers(a) == as_numbers(b)).all()


def rope_tables(positions, pairs):
    angles = torch.arange(positions)[:, None] * 0.37 ** torch.arange(pairs)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("rope", [None, "half-split", "interleaved", "partial"])
@pytest.mark.parametrize("new", ["one", "three", "ragged", "wrong-offsets"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("vectors", [True, False], ids=["vectors", "scalars"])
@pytest.mark.parametrize("cache", ["fp16", "e4m3"])
def test_append(cache, vectors, paged, new, rope, append):
    """Lengths and page ids out of range too; everything beside the new rows stays as it was."""
    ragged = new in ("ragged", "wrong-offsets")
    batch, tokens = 4, {"one": 1, "three": 3}.get(new, 2)
    shape = (1, 7) if ragged else (batch, tokens)
    wide = 0 if vectors else 1  # an odd stride forbids vectors

    def rows(heads, dim):
        return torch.randn(*shape, heads, dim + wide).half()[..., :dim]

    q, k, v = rows(HEADS_Q, DIM), rows(HEADS, DIM), rows(HEADS, DIM_V)
    dtype = torch.float16 if cache == "fp16" else torch.float8_e4m3fn
    caches = [torch.randn(6, 5, HEADS, dim).to(dtype) for dim in (DIM, DIM_V)]
    lengths = int32([0, 4, 7, -3], "cpu")
    table = int32([[3, 0], [5, 2], [1, 4], [77, -1]], "cpu") if paged else None
    if not paged:
        caches = [x[:batch].clone() for x in caches]
    cu = offsets([2, 0, 4, 1], "cpu") if new == "ragged" else None
    if new == "wrong-offsets":
        cu = int32([1, 5, 3, 2147483647, -9], "cpu")
    scale = torch.tensor([0.5, 2.0, 0.25]) if cache == "e4m3" else None
    cos = sin = None
    if rope:
        cos, sin = rope_tables(8, 16 if rope == "partial" else DIM // 2)

    wanted_q, *wanted = (x.clone() for x in (q, *caches))
    flat = [x[0] if ragged else x for x in (wanted_q, k, v)]
    options = dict(cu_seqlens=cu, k_scale=scale, v_scale=scale)
    if rope:
        torch.ops.leanattn.rope_append_kv(
            *flat, *wanted, lengths, table, cos, sin, interleaved=rope == "interleaved", **options
        )
    else:
        torch.ops.leanattn.append_kv(*flat[1:], *wanted, lengths, table, **options)

    def arrays(*tensors):
        return [None if x is None else x.numpy() for x in tensors]

    append(
        *(as_numbers(x) for x in (q, k, v, *caches)), *arrays(lengths, table, cu, scale, cos, sin),
        rope == "interleaved",
    )  # fmt: skip
    for mine, theirs in zip(caches, wanted):
        assert_same_memory(mine, theirs)
    assert_same_memory(q.contiguous(), wanted_q.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [8, 40, 128, 7])
@pytest.mark.parametrize("states", [1, 2, 9])
def test_merge(states, dim, dtype, merge):
    """Empty states of both kinds, and NaN behind them, which must not be read."""
    outs = torch.randn(states, 50, dim).to(dtype)
    lses = 5 * torch.randn(states, 50)
    empty = torch.rand(states, 50) < 0.3
    outs[empty] = torch.nan
    lses[empty] = torch.where(torch.rand(empty.sum()) < 0.5, -torch.inf, torch.inf)
    expected, expected_lse = torch.ops.leanattn.merge_states(outs, lses)
    given = outs.numpy() if dtype == torch.float32 else as_numbers(outs)
    out, lse = merge(given, lses.numpy())
    torch.testing.assert_close(torch.from_numpy(out).view(dtype), expected, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(lse), expected_lse)
