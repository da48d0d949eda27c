"""What decode must compute, in plain torch, and how near to it is near enough.

`reference` is the definition in fp64. `same_dtype` is what a user would write in the tensors' own
dtype; its error is the yardstick. `assert_close` holds a result against both. Nothing here knows
how the op works: keys are found by slicing the visible range of each query row, so what a row may
not see is never touched, not even to be multiplied by zero.
"""

import torch

LSE_TOLERANCE = 2e-5
COSINE_TOLERANCE = 5e-6
# A weight below 2^-126 may count as 0; this is what 65 536 such keys with values of 1 add up to.
FLUSHED = 2.0**-110

# How many numbers of K, V and scores the reference takes at a time, if not one sequence has more.
NUMBERS_AT_ONCE = 2**24


def clamped_lengths(cache_seqlens, batch, capacity):
    """Valid tokens of each sequence, inside [0, capacity]."""
    if cache_seqlens is None:
        return [capacity] * batch
    return cache_seqlens.long().clamp(0, capacity).tolist()


def own_tokens(capacity, ranks=1, rank=0, interleave=1):
    """(the tokens that stand in a rank's cache, in order `[<= capacity]`, and how many a sequence
    may have): dealt out one after the other until a rank's cache is full."""
    token = torch.arange(ranks * (capacity + interleave))
    owner = token // interleave % ranks
    max_length = int((owner == 0).nonzero()[capacity])  # rank 0 is the first to be full
    return token[(owner == rank) & (token < max_length)], max_length


def query_ranges(q, batch, cu_seqlens_q):
    """Half-open range of rows of each sequence, in q flattened to [rows, Hq, D]."""
    if cu_seqlens_q is None:
        seqlen_q = q.shape[1] if q.dim() == 4 else 1
        return [(i * seqlen_q, (i + 1) * seqlen_q) for i in range(batch)]
    bounds = []
    for entry in cu_seqlens_q.tolist():
        previous = bounds[-1] if bounds else 0
        bounds.append(min(max(entry, previous), q.shape[0]))
    return list(zip(bounds[:-1], bounds[1:]))


def alike(lengths, ranges):
    """{(length, number of queries): sequences}. Those whose rows see the same keys are computed
    together: one by one, thousands take most of a minute on a GPU."""
    groups = {}
    for sequence, (length, (begin, end)) in enumerate(zip(lengths, ranges)):
        if begin < end:
            groups.setdefault((length, end - begin), []).append(sequence)
    return groups


def visible_range(length, seqlen_q, row, causal=True, window_left=-1, window_right=-1):
    """Half-open range of the keys that one query row sees."""
    position = length - seqlen_q + row
    begin, end = 0, length
    if causal:
        end = min(end, position + 1)
    if window_left >= 0:
        begin = max(begin, position - window_left)
    if window_right >= 0:
        end = min(end, position + window_right + 1)
    return begin, max(begin, end)


def visible_mask(length, seqlen_q, tokens, causal, window_left, window_right):
    """[Sq, n] of bool: which of the tokens `[n]` each query row sees."""
    rows = [
        visible_range(length, seqlen_q, row, causal, window_left, window_right)
        for row in range(seqlen_q)
    ]
    first, last = torch.tensor(rows, device=tokens.device).T[:, :, None]
    return (tokens >= first) & (tokens < last)


def attend(q, k, v, visible, distance, scale, softcap, slopes, sinks, rounded):
    """Rows that see at least one key, of s sequences: q [s, r, Hq, D], k [s, n, Hkv, D],
    v [s, n, Hkv, Dv], visible and distance [r, n], slopes [Hq] or [s, 1, Hq]. `rounded` stands
    wherever a narrow dtype would store a result.
    """
    grouped = q.unflatten(2, (k.shape[2], -1))
    scores = rounded(torch.einsum("srhgd,snhd->srhgn", grouped, k)).flatten(2, 3)
    scores = rounded(scores * scale)
    if softcap:
        scores = rounded(softcap * torch.tanh(scores / softcap))
    if slopes is not None:
        scores = scores - slopes[..., None] * distance[:, None, :]
    logits = torch.where(visible[:, None, :], scores, -torch.inf)

    largest = logits.amax(-1)
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    weights = torch.exp(logits - largest[..., None])
    total = weights.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    weights = rounded(weights / total[..., None])
    out = rounded(weighted_sum(weights.unflatten(2, grouped.shape[2:4]), v, visible))
    return out.flatten(2, 3), largest + total.log()


def weighted_sum(weights, v, visible):
    """weights [s, r, Hkv, g, n] times v [s, n, Hkv, Dv], where the zero weight of an unseen key is
    no factor: a key that holds NaN or Inf is added to the rows that see it and to no others."""
    special = ~v.isfinite().flatten(2).all(2)
    finite_v = torch.where(special[..., None, None], 0, v)
    finite_weights = torch.where(special[:, None, None, None], 0, weights)
    out = torch.einsum("srhgn,snhd->srhgd", finite_weights, finite_v)
    for sequence, key in special.nonzero().tolist():
        term = weights[sequence, ..., key, None] * v[sequence, key, :, None, :]
        out[sequence] += torch.where(visible[:, key, None, None, None], term, 0)
    return out


def scaled(rows, scale, sequence):
    """rows [n, Hkv, D] of a float8 cache times its scale: one, or of each KV head, or of each
    sequence and KV head. Or [s, n, Hkv, D], and as many sequences."""
    if scale is None:
        return rows
    if scale.numel() == 1:
        return rows * scale.to(rows.dtype).flatten()
    scale = scale if scale.dim() == 1 else scale[sequence]
    return rows * scale.to(rows.dtype)[..., None, :, None]


def unrounded(tensor):
    """What the fp64 reference stores: everything as it is."""
    return tensor


def reference(
    q, k_cache, v_cache, cache_seqlens=None, *, cu_seqlens_q=None, softmax_scale=None, causal=True,
    window_left=-1, window_right=-1, softcap=0.0, alibi_slopes=None, sinks=None, k_scale=None,
    v_scale=None, cp_world_size=1, cp_rank=0, cp_interleave=1, compute_dtype=torch.float64,
    rounded=unrounded,
):  # fmt: skip
    """(out, lse) of every row of every sequence, in fp64."""
    batch, capacity = k_cache.shape[:2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    own, max_length = own_tokens(capacity, cp_world_size, cp_rank, cp_interleave)
    own = own.to(q.device)
    lengths = clamped_lengths(cache_seqlens, batch, max_length)
    ranges = query_ranges(q, batch, cu_seqlens_q)
    rows = (q.flatten(0, 1) if q.dim() == 4 else q).to(compute_dtype)
    out = rows.new_zeros(*rows.shape[:2], v_cache.shape[-1])
    lse = rows.new_full(rows.shape[:2], -torch.inf)
    sinks = None if sinks is None else sinks.to(compute_dtype)

    for (length, seqlen_q), sequences in alike(lengths, ranges).items():
        first_rows = torch.tensor([ranges[sequence][0] for sequence in sequences], device=q.device)
        own_rows = first_rows[:, None] + torch.arange(seqlen_q, device=q.device)  # [s, Sq]
        if sinks is not None:
            lse[own_rows] = sinks
        begin, _ = visible_range(length, seqlen_q, 0, causal, window_left, window_right)
        _, end = visible_range(length, seqlen_q, seqlen_q - 1, causal, window_left, window_right)
        begin, end = torch.searchsorted(own, torch.tensor([begin, end], device=q.device)).tolist()
        tokens = own[begin:end]
        visible = visible_mask(length, seqlen_q, tokens, causal, window_left, window_right)
        sees = visible.any(1)
        if not sees.any():
            continue
        positions = length - seqlen_q + torch.arange(seqlen_q, device=q.device)
        distance = (positions[:, None] - tokens).abs()
        visible, distance = visible[sees], distance[sees].to(compute_dtype)
        own_rows = own_rows[:, sees]
        of_keys = k_cache.shape[2] * (k_cache.shape[3] + v_cache.shape[3])
        of_scores = len(visible) * rows.shape[1]
        count = max(1, NUMBERS_AT_ONCE // ((end - begin) * (of_keys + of_scores)))
        sequences = torch.tensor(sequences, device=q.device)
        for some, some_rows in zip(sequences.split(count), own_rows.split(count)):
            slopes = alibi_slopes
            if slopes is not None:
                slopes = slopes if slopes.dim() == 1 else slopes[some][:, None]
                slopes = slopes.to(compute_dtype)
            out[some_rows], lse[some_rows] = attend(
                rows[some_rows],
                scaled(k_cache[:, begin:end][some].to(compute_dtype), k_scale, some),
                scaled(v_cache[:, begin:end][some].to(compute_dtype), v_scale, some),
                visible, distance, scale, softcap, slopes, sinks, rounded,
            )  # fmt: skip
    return out.view(*q.shape[:-1], v_cache.shape[-1]), lse.view(q.shape[:-1])


def same_dtype(q, k_cache, v_cache, cache_seqlens=None, **options):
    """`out` as plain torch in q's dtype gives it: products, scores and weights stored in it."""
    out, _ = reference(
        q, k_cache, v_cache, cache_seqlens, **options,
        compute_dtype=torch.float32, rounded=lambda x: x.to(q.dtype).float(),
    )  # fmt: skip
    return out.to(q.dtype)


def ulp(magnitude, dtype):
    """Spacing of `dtype` at a magnitude (fp64 tensor), the smallest subnormal at zero."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.clamp(min=info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(magnitude, info.eps), exponent)


def assert_close(out, lse, **case):
    """Hold a result against fp64: error, direction, logarithm, and where it is not finite.

    Rules (1) of the policy are applied to each row and head by itself, the cosine to each row: a
    batch mixes outputs of very different size, and a limit for the largest hides the rest. An error
    of FLUSHED is none, but in rows of 0.
    """
    expected, expected_lse = reference(**case)
    assert out.shape == expected.shape, f"out {tuple(out.shape)}, not {tuple(expected.shape)}"
    assert lse.shape == out.shape[:-1], f"lse {tuple(lse.shape)} beside out {tuple(out.shape)}"
    assert out.dtype == case["q"].dtype and lse.dtype == torch.float32
    if out.numel() == 0:
        return
    assert_same_specials("out", out, expected.to(out.dtype))
    assert_same_specials("lse", lse, expected_lse.float())

    wide = finite(out.double())
    truth = finite(expected)
    yardstick = same_dtype(**case).double()
    yardstick = torch.where(yardstick.isfinite() & expected.isfinite(), yardstick, truth)
    magnitude = truth.abs().amax(-1, keepdim=True)
    wide = wide - torch.where(magnitude == 0, 0, (wide - truth).clamp(-FLUSHED, FLUSHED))
    # Of a few numbers the largest error says little: then of all heads of a row.
    of_row = (-2, -1) if out.shape[-1] < 8 else -1
    errors = (yardstick - truth).abs().amax(of_row, keepdim=True)
    limit = 2 * errors + 2 * ulp(magnitude, out.dtype)
    if out.dtype == torch.float32:
        # Of the whole batch, as the rule is stated: row by row it asks for more than fp32 gives to
        # outputs that sinks or distances have made tiny.
        limit = limit.clamp(min=2 * (yardstick - truth).abs().max())
    limit = torch.where(magnitude == 0, 0, limit)
    assert_within("out", wide, truth, limit)
    assert_within("lse", finite(lse.double()), finite(expected_lse),
                  LSE_TOLERANCE * finite(expected_lse).abs().clamp(min=1))  # fmt: skip

    # Numbers below the dtype's normal range have too few bits for any cosine: there even the
    # rounded truth is no better than this.
    best_possible = 4 * cosine_difference(truth.to(out.dtype).double(), truth)
    difference = cosine_difference(wide, truth)
    assert_within("cosine", difference, torch.zeros_like(difference),
                  best_possible.clamp(min=COSINE_TOLERANCE))  # fmt: skip


def cosine_difference(actual, expected):
    """FlashMLA's 1 - 2 a.b / (a.a + b.b) of the heads of each row, 0 where both are 0."""
    actual, expected = actual.flatten(-2), expected.flatten(-2)
    squares = (actual * actual + expected * expected).sum(-1)
    difference = 1 - 2 * (actual * expected).sum(-1) / squares.clamp(min=1e-300)
    return torch.where(squares == 0, 0, difference)


def finite(tensor):
    """The tensor with 0 where it is NaN or infinite."""
    return torch.where(tensor.isfinite(), tensor, 0)


def assert_within(name, actual, expected, limit):
    """|actual - expected| <= limit everywhere; says where it is worst."""
    excess = (actual - expected).abs() - limit
    if excess.max() <= 0:
        return
    where = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    limit = limit.expand_as(actual)
    raise AssertionError(
        f"{name}{list(where)} is {actual[where].item():.9g}, fp64 gives "
        f"{expected[where].item():.9g}, limit {limit[where].item():.3g}; "
        f"{int((excess > 0).sum())} of {excess.numel()} are beyond their limit"
    )


def assert_same_specials(name, actual, expected):
    """NaN, +inf and -inf stand at the same places."""
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(actual) != test(expected)
        if differs.any():
            where = differs.nonzero()[0].tolist()
            raise AssertionError(
                f"{name}{where} is {actual[tuple(where)].item()}, fp64 gives "
                f"{expected[tuple(where)].item()}: {kind} at {int(differs.sum())} wrong places"
            )


def assert_same_bits(actual, expected):
    """Bit for bit the same, NaN included; says where they first differ."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    differs = actual.contiguous().view(integer) != expected.contiguous().view(integer)
    if differs.any():
        where = differs.nonzero()[0].tolist()
        raise AssertionError(
            f"first difference at {where}: {actual[tuple(where)].item()!r} and "
            f"{expected[tuple(where)].item()!r}; {int(differs.sum())} of {differs.numel()} differ"
        )
