"""FlashAttention's documented meaning in fp64, one sequence at a time, and random calls of all its
functions to hold against it.

    python tests/flash_attn_cases.py --calls 2000            every call by the way that it goes
    python tests/flash_attn_cases.py --calls 2000 --device cuda
"""

import argparse
import math
import random

import torch

import leanattn

# Relative to 1 + |expected|; a few times what torch's own backends show in these dtypes.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}


def attend(q, k, v, *, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """One sequence, fp64: (out `[Sq, Hq, Dv]`, lse `[Hq, Sq]`) of q `[Sq, Hq, D]`, k `[Sk, Hkv, D]`
    and v `[Sk, Hkv, Dv]`. Query i stands at key Sk - Sq + i."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(len(q), device=q.device) + len(k) - len(q)
    distances = positions[:, None] - torch.arange(len(k), device=q.device)
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distances.abs()
    hidden = torch.zeros_like(distances, dtype=torch.bool)
    if window[0] >= 0:
        hidden |= distances > window[0]
    if causal or window[1] >= 0:
        hidden |= distances < (0 if causal else -window[1])
    scores = scores.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(scores, -1) if len(k) else scores.new_full(scores.shape[:2], -math.inf)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return torch.einsum("hij,jhd->ihd", weights, v), lse


def assert_near(actual, expected, dtype):
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} for {tuple(expected.shape)}"
    limit = TOLERANCES[dtype] * (1 + expected.abs())
    wrong = ~((actual.double() - expected).abs() <= limit) & ~(actual.double() == expected)
    assert not wrong.any(), f"off by {(actual.double() - expected).abs()[wrong].max().item():.3g}"


class Call:
    """A random call: which function, with what, what is right. The same for a seed and index."""

    def __init__(self, index, device="cpu", seed=0, dtypes=None):
        self.draw = random.Random(f"{seed} {index}")
        self.device = device
        narrow = [torch.float16, torch.bfloat16]
        self.dtype = self.draw.choice(dtypes or (narrow if device == "cuda" else list(TOLERANCES)))
        self.generator = torch.Generator().manual_seed(self.draw.randrange(1 << 30))
        pick = self.draw.choice
        self.function = pick(sorted(FORMS))
        heads_kv, group = pick([(1, 1), (1, 5), (2, 1), (2, 4), (3, 2)])
        self.heads = (heads_kv * group, heads_kv)
        dims = [16, 20, 32, 40, 64, 80, 100, 128, 256]
        self.dim = pick(dims)
        self.dim_v = self.dim if self.draw.random() < 0.8 else pick(dims)
        self.batch = pick([1, 2, 3])
        self.options = self._options()
        self.wants_lse = self.draw.random() < 0.4

    def normal(self, *shape):
        values = torch.randn(shape, generator=self.generator)
        return values.to(self.device, self.dtype)

    def int32(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def length(self, longest=70):
        return self.draw.choice([1, 2, self.draw.randint(1, 16), self.draw.randint(1, longest)])

    def _options(self):
        chance, pick = self.draw.random, self.draw.choice
        given = {}
        if chance() < 0.5:
            given["causal"] = True
        if chance() < 0.3:
            given["window_size"] = (pick([-1, 0, 3, 20]), pick([-1, 0, 2, 20]))
        if chance() < 0.2:
            given["softcap"] = pick([2.0, 15.0])
        if chance() < 0.2:
            given["softmax_scale"] = pick([0.05, 0.3])
        if chance() < 0.2:
            shape = pick([(self.heads[0],), (self.batch, self.heads[0])])
            slopes = torch.rand(shape, generator=self.generator) * 0.3
            given["alibi_slopes"] = slopes.to(self.device)
        return given

    def expected(self, b, q, k, v):
        options = self.options
        slopes = options.get("alibi_slopes")
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        return attend(
            q, k, v, scale=options.get("softmax_scale"), causal=options.get("causal", False),
            window=options.get("window_size", (-1, -1)), softcap=options.get("softcap", 0.0),
            slopes=slopes,
        )  # fmt: skip

    def check(self):
        FORMS[self.function](self)

    def hold(self, result, sequences, is_ragged, lse_name="return_attn_probs"):
        """`sequences`: (q, k, v) of each, as FlashAttention documents it."""
        expected = [self.expected(b, *sequence) for b, sequence in enumerate(sequences)]
        outs, lses = zip(*expected)
        if is_ragged:
            out, lse = torch.cat(outs), torch.cat(lses, 1)
        else:
            out, lse = torch.stack(outs), torch.stack(lses)
        if self.wants_lse:
            result, actual_lse, *rest = result
            assert actual_lse.dtype == torch.float32 and actual_lse.is_contiguous()
            assert_near(actual_lse, lse, self.dtype)
            assert [x.numel() for x in rest] == [0] * (lse_name == "return_attn_probs")
        assert result.dtype == self.dtype
        assert_near(result, out, self.dtype)


def _dense(call):
    queries, keys = call.length(), call.length()
    heads_q, heads_kv = call.heads
    q = call.normal(call.batch, queries, heads_q, call.dim)
    k = call.normal(call.batch, keys, heads_kv, call.dim)
    v = call.normal(call.batch, keys, heads_kv, call.dim_v)
    options = dict(call.options, return_attn_probs=call.wants_lse)
    call.hold(leanattn.flash_attn_func(q, k, v, **options), zip(q, k, v), False)


def _kvpacked(call):
    q = call.normal(call.batch, call.length(), call.heads[0], call.dim)
    kv = call.normal(call.batch, call.length(), 2, call.heads[1], call.dim)
    options = dict(call.options, return_attn_probs=call.wants_lse)
    result = leanattn.flash_attn_kvpacked_func(q, kv, **options)
    call.hold(result, zip(q, *kv.unbind(2)), False)


def _qkvpacked(call):
    qkv = call.normal(call.batch, call.length(), 3, call.heads[0], call.dim)
    options = dict(call.options, return_attn_probs=call.wants_lse)
    call.hold(leanattn.flash_attn_qkvpacked_func(qkv, **options), zip(*qkv.unbind(2)), False)


def _ragged(call, *, packed=None, paged=False):
    pick = call.draw.choice
    lengths_q = [call.length() * (call.draw.random() < 0.9) for _ in range(call.batch)]
    lengths_k = [call.length() * (call.draw.random() < 0.9) for _ in range(call.batch)]
    if packed == "qkv":
        lengths_k = lengths_q
    offsets = [call.int32([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (lengths_q, lengths_k)]
    longest = [max(n) + pick([0, 0, 3]) for n in (lengths_q, lengths_k)]
    heads_q, heads_kv = call.heads
    options = dict(call.options, return_attn_probs=call.wants_lse)
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    if packed == "qkv":
        qkv = call.normal(total_q, 3, heads_q, call.dim)
        q, k, v = qkv.unbind(1)
        result = leanattn.flash_attn_varlen_qkvpacked_func(qkv, offsets[0], longest[0], **options)
    elif packed == "kv":
        q = call.normal(total_q, heads_q, call.dim)
        kv = call.normal(total_k, 2, heads_kv, call.dim)
        k, v = kv.unbind(1)
        result = leanattn.flash_attn_varlen_kvpacked_func(q, kv, *offsets, *longest, **options)
    else:
        q = call.normal(total_q, heads_q, call.dim)
        k = call.normal(total_k, heads_kv, call.dim)
        v = call.normal(total_k, heads_kv, call.dim_v)
        caches, more = (k, v), {}
        if paged:
            table, *caches = in_pages(call, lengths_k, k, v)
            more = dict(block_table=table)
        result = leanattn.flash_attn_varlen_func(
            q, *caches, *offsets, *longest, **options, **more
        )  # fmt: skip
    pieces = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    call.hold(result, pieces, True)


def in_pages(call, lengths, *rows):
    """`[total, ...]` rows as pages that lie anywhere, the rest of them NaN: (table, pages, ...)."""
    page_size = call.draw.choice([1, 4, 16])
    counts = [-(-n // page_size) for n in lengths]
    order = list(range(sum(counts) + 2))
    call.draw.shuffle(order)
    table = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    pages = [
        torch.full((len(order), page_size, *x.shape[1:]), math.nan, device=x.device, dtype=x.dtype)
        for x in rows
    ]
    begin = 0
    for b, (length, count) in enumerate(zip(lengths, counts)):
        table[b, :count] = torch.tensor([order.pop() for _ in range(count)])
        for j in range(length):
            for x, into in zip(rows, pages):
                into[table[b, j // page_size], j % page_size] = x[begin + j]
        begin += length
    return table.to(call.device), *pages


def _with_kvcache(call):
    """Contiguous, chosen rows or pages; appended to or not; ragged queries; float8."""
    pick, chance = call.draw.choice, call.draw.random
    heads_q, heads_kv = call.heads
    lengths = [call.length(60) * (chance() < 0.9) for _ in range(call.batch)]
    old = [
        (call.normal(n, heads_kv, call.dim), call.normal(n, heads_kv, call.dim_v)) for n in lengths
    ]
    is_ragged, appends, paged = chance() < 0.3, chance() < 0.5, chance() < 0.4
    new_lengths = [call.length(6)] * call.batch
    if appends and is_ragged:
        new_lengths = [call.length(6) for _ in range(call.batch)]
    capacity = max(lengths) + max(new_lengths) + pick([0, 5])
    options = dict(call.options)
    # Caches with room, NaN where there is nothing.
    k, v = zip(*old)
    rooms = [
        torch.full((call.batch, capacity, heads_kv, dim), math.nan, device=call.device).to(
            call.dtype
        )
        for dim in (call.dim, call.dim_v)
    ]
    for room, rows in zip(rooms, (k, v)):
        for b, x in enumerate(rows):
            room[b, : len(x)] = x
    if paged:
        full = [capacity] * call.batch
        table, *rooms = in_pages(call, full, *(room.flatten(0, 1) for room in rooms))
        options[pick(["block_table", "page_table"])] = table
    elif chance() < 0.3:
        rows = list(range(call.batch + 2))
        call.draw.shuffle(rows)
        chosen = rows[: call.batch]
        more = [x.new_full((call.batch + 2, *x.shape[1:]), math.nan) for x in rooms]
        for into, room in zip(more, rooms):
            into[chosen] = room
        rooms, options["cache_batch_idx"] = more, call.int32(chosen)
    keys, values = list(k), list(v)
    if appends:
        new = [
            [call.normal(n, heads_kv, dim) for n in new_lengths] for dim in (call.dim, call.dim_v)
        ]
        keys = [torch.cat(x) for x in zip(keys, new[0])]
        values = [torch.cat(x) for x in zip(values, new[1])]
        join = torch.cat if is_ragged else torch.stack
        options["k"], options["v"] = join(new[0]), join(new[1])
        if is_ragged:
            ends = torch.tensor(new_lengths).cumsum(0).tolist()
            options["cu_seqlens_k_new"] = call.int32([0, *ends])
    if is_ragged:
        query_lengths = [call.length(8) for _ in range(call.batch)]
        options["cu_seqlens_q"] = call.int32([0, *torch.tensor(query_lengths).cumsum(0).tolist()])
        options["max_seqlen_q"] = max(query_lengths)
    else:
        query_lengths = [call.length(8)] * call.batch
    queries = [call.normal(n, heads_q, call.dim) for n in query_lengths]
    q = (torch.cat if is_ragged else torch.stack)(queries)
    result = leanattn.flash_attn_with_kvcache(
        q, *rooms, cache_seqlens=call.int32(lengths), return_softmax_lse=call.wants_lse, **options
    )
    call.hold(result, zip(queries, keys, values), is_ragged, "return_softmax_lse")


FORMS = {
    "flash_attn_func": _dense,
    "flash_attn_kvpacked_func": _kvpacked,
    "flash_attn_qkvpacked_func": _qkvpacked,
    "flash_attn_varlen_func": _ragged,
    "flash_attn_varlen_func, paged": lambda call: _ragged(call, paged=True),
    "flash_attn_varlen_kvpacked_func": lambda call: _ragged(call, packed="kv"),
    "flash_attn_varlen_qkvpacked_func": lambda call: _ragged(call, packed="qkv"),
    "flash_attn_with_kvcache": _with_kvcache,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made = dict.fromkeys(FORMS, 0)
    for index in range(arguments.calls):
        call = Call(index, arguments.device, arguments.seed)
        try:
            call.check()
        except Exception:
            print(f"call {index} of seed {arguments.seed}: {call.function}, {call.options}")
            raise
        made[call.function] += 1
    print(f"{arguments.calls} calls against fp64, none wrong:")
    for name, count in made.items():
        print(f"{count:6d} {name}")


if __name__ == "__main__":
    main()
