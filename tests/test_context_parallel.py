"""cp_world_size, cp_rank and cp_interleave: a cache that holds one rank's part of the tokens.

All ranks in one process; test_distributed.py has one process each.
"""

import itertools

import pytest
import torch
from cases import int32, make_case, sharp_dtype
from dealing import DEALINGS, context_parallel, deal, gather_state, part_of
from reference import assert_close, assert_same_bits, own_tokens, reference

import leanattn

CASES = {
    "one-query": dict(seqlen_q=None),
    "causal-queries": dict(seqlen_q=5),
    "more-queries-than-tokens": dict(seqlen_q=9, lengths=(4, 300, 0)),
    "not-causal": dict(seqlen_q=3, causal=False),
    "many-rows": dict(seqlen_q=40, heads=(8, 1)),
    "window": dict(seqlen_q=4, window_left=50),
    "narrow-window": dict(seqlen_q=70, heads=(2, 2), window_left=3),
    "window-on-both-sides": dict(seqlen_q=6, causal=False, window_left=20, window_right=2),
    "alibi": dict(seqlen_q=3, alibi="batch"),
    "softcap-and-sinks": dict(seqlen_q=2, softcap=3.0, sinks=True),
    "ragged-queries": dict(query_lengths=(3, 0, 40)),
    "batch-invariant": dict(seqlen_q=2, batch_invariant=True),
    "empty-and-short": dict(lengths=(0, 1, 2, 17, 200)),
    "wide-window-alibi-sinks": dict(seqlen_q=3, window_left=130, alibi="heads", sinks=True),
}


def merged(case, ranks, interleave, **options):
    return leanattn.merge_states(*gather_state(case, ranks, interleave, **options))


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_together_are_one(name, device):
    """What the ranks' parts come to, against attention to all tokens in fp64."""
    for ranks, interleave in DEALINGS:
        case = make_case(device, sharp_dtype(device), **CASES[name])
        whole = {key: x for key, x in case.items() if key != "batch_invariant"}
        assert_close(*merged(case, ranks, interleave), **whole)


def test_without_lengths_all_ranks_are_full(device, loader):
    case = make_case(device, sharp_dtype(device), lengths=None, batch=2, capacity=240, seqlen_q=3)
    for ranks, interleave in ((2, None), (4, None), (2, 1), (4, 20), (3, 80)):
        assert_close(*merged(case, ranks, interleave), **case)


@pytest.mark.parametrize("page_size", [1, 16, 24])
def test_pages(page_size, device, loader):
    """A rank's pages hold its own tokens, one behind the other."""
    for ranks, interleave in DEALINGS:
        case = make_case(device, sharp_dtype(device), seqlen_q=2, window_left=100)
        assert_close(*merged(case, ranks, interleave, page_size=page_size), **case)


@pytest.mark.parametrize("ranks, interleave", DEALINGS)
def test_one_rank_alone(ranks, interleave, device, loader):
    """Each rank's own out and lse are those of attention to its tokens, where it has none too."""
    for options in (dict(seqlen_q=3, alibi="heads", window_left=90), dict(causal=False)):
        case = make_case(device, sharp_dtype(device), lengths=(3, 200, 77, 0), **options)
        for rank in range(ranks):
            call = deal(case, ranks, rank, interleave)
            call |= context_parallel(case, ranks, rank, interleave)
            assert_close(*torch.ops.leanattn.decode_with_lse(**call), **call)


def test_one_rank_has_the_bits_of_none(device, loader):
    """The defaults, and any interleave with one rank, change nothing."""
    for options in (dict(), dict(seqlen_q=5, alibi="heads", window_left=60)):
        case = make_case(device, sharp_dtype(device), **options)
        plain = torch.ops.leanattn.decode_with_lse(**case)
        for interleave in (1, 7, 2**31 - 1):
            again = torch.ops.leanattn.decode_with_lse(
                **case, cp_world_size=1, cp_rank=0, cp_interleave=interleave
            )
            for actual, expected in zip(again, plain):
                assert_same_bits(actual, expected)


def test_rows_between_the_windows_are_written(device):
    """Under a narrow window any block of rows may see none of a rank's tokens, not only the first:
    such rows are 0 and -inf, and not what lay there before."""
    case = make_case(
        device, sharp_dtype(device), lengths=(400,), heads=(1, 1), seqlen_q=300, window_left=2
    )
    for rank in range(2):
        call = deal(case, 2, rank, 100) | context_parallel(case, 2, rank, 100)
        out = torch.full_like(case["q"], 7.0)
        lse = torch.full(out.shape[:-1], 7.0, device=out.device)
        torch.ops.leanattn.decode_with_lse_out(**call, out=out, lse=lse)
        expected, expected_lse = reference(**call)
        empty = expected_lse == -torch.inf
        assert 50 < empty.sum() < 250
        assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
        assert_close(out, lse, **call)


def test_lengths_are_clamped_to_what_all_can_hold(device):
    """A rank's cache may be no multiple of the interleave: the first rank is full first. No length
    leads outside."""
    for capacity, (ranks, interleave) in itertools.product((50, 64, 3), [(2, 7), (3, 64), (2, 64)]):
        _, max_length = own_tokens(capacity, ranks, 0, interleave)
        case = make_case(device, sharp_dtype(device), lengths=(5,) * 3, capacity=capacity,
                         seqlen_q=2, poison=None)  # fmt: skip
        for rank in range(ranks):
            ends = context_parallel(case, ranks, rank, interleave)
            ends["cp_interleave"] = interleave
            bad = case | ends | {"cache_seqlens": int32([max_length + 1, 2**31 - 1, -5], device)}
            good = case | ends | {"cache_seqlens": int32([max_length, max_length, 0], device)}
            assert_close(*torch.ops.leanattn.decode_with_lse(**bad), **good)


def test_tokens_beyond_2_to_the_30(device):
    """Positions near 2^31, as of the last of many ranks."""
    case = make_case(device, sharp_dtype(device), lengths=(5,), capacity=32, seqlen_q=2,
                     poison=None, alibi="heads")  # fmt: skip
    ranks, interleave = 2**26, 31
    length = ranks * interleave - 3  # the last rank lacks its last three tokens
    call = case | dict(cache_seqlens=int32([length], device), cp_world_size=ranks,
                       cp_rank=ranks - 1, cp_interleave=interleave)  # fmt: skip
    # To the one rank alone that is a sequence of its own 28 tokens, its queries at the end.
    own = case | dict(cache_seqlens=int32([28], device))
    assert_close(*torch.ops.leanattn.decode_with_lse(**call), **own)


# --- out in float32 ------------------------------------------------------------------------------


def test_out_in_float32(device, loader, dtype):
    """Unrounded: rounded to q's dtype it is what a call without gives, rows without keys too."""
    if dtype == torch.float32:
        pytest.skip("is what it is anyway")
    for options in (dict(seqlen_q=3, lengths=(2, 300, 0)), dict(seqlen_q=20, heads=(8, 2)),
                    dict(query_lengths=(2, 0, 3)), dict(batch_invariant=True)):  # fmt: skip
        case = make_case(device, dtype, **options)
        out, lse = torch.ops.leanattn.decode_with_lse(**case)
        wide = torch.full(out.shape, 7.0, device=out.device)
        torch.ops.leanattn.decode_out(**case, out=wide)
        assert_same_bits(wide.to(dtype), out)
        assert (wide != out.float()).any()


def test_parts_are_rounded_once(device):
    """Parts that all but cancel: rounded to 16 bits before they are merged, they would be off by
    many times the error of plain attention in 16 bits. So they travel in float32."""
    dtype = torch.bfloat16
    case = make_case(device, dtype, lengths=(256,), capacity=256, heads=(2, 2), poison=None)
    case["q"].zero_()  # all keys weigh the same
    ramp = torch.linspace(0, 1, 128, device=case["q"].device)[None, :, None, None]
    case["v_cache"][:, :128] = 100 + ramp
    case["v_cache"][:, 128:] = -(100 + 0.96 * ramp)

    def in_float32(q, v_cache, **call):
        out = torch.empty(*q.shape[:-1], v_cache.shape[-1], device=q.device)
        lse = torch.empty(q.shape[:-1], device=q.device)
        torch.ops.leanattn.decode_with_lse_out(q=q, v_cache=v_cache, **call, out=out, lse=lse)
        return out, lse

    out, lse = leanattn.merge_states(*gather_state(case, 2, None, decode=in_float32), dtype=dtype)
    assert_close(out, lse, **case)
    twice, lse = merged(case, 2, None)
    with pytest.raises(AssertionError, match="limit"):
        assert_close(twice, lse, **case)


# --- Appending -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 16])
def test_append_writes_a_ranks_own_tokens(page_size, device):
    """Token by token and several at once: all ranks' caches are what dealing out gives."""
    for ranks, interleave in DEALINGS:
        case = make_case(device, sharp_dtype(device), lengths=(70, 33, 0), capacity=96, poison=None)
        lengths, new = torch.tensor([60, 33, 0]), torch.tensor([20, 1, 50])
        k, v = (case[name] for name in ("k_cache", "v_cache"))
        offsets = int32([0, *new.cumsum(0).tolist()], device)
        rows = [torch.cat([x[i, b : b + n] for i, (b, n) in enumerate(zip(lengths, new))])
                for x in (k, v)]  # fmt: skip
        for rank in range(ranks):
            call = deal(case, ranks, rank, interleave, page_size)
            expected = call["k_cache"].clone(), call["v_cache"].clone()
            for sequence in range(3):  # forget what append is to bring back
                erase(call, case, ranks, rank, interleave, page_size, sequence,
                      int(lengths[sequence]), int(new[sequence]))  # fmt: skip
            leanattn.append_kv(
                *rows, call["k_cache"], call["v_cache"], int32(lengths.tolist(), device),
                call.get("block_table"), cu_seqlens=offsets,
                **context_parallel(case, ranks, rank, interleave),
            )  # fmt: skip
            assert_same_bits(call["k_cache"], expected[0])
            assert_same_bits(call["v_cache"], expected[1])


def erase(call, case, ranks, rank, interleave, page_size, sequence, begin, count):
    """Overwrites a rank's tokens among [begin, begin + count)."""
    interleave = context_parallel(case, ranks, rank, interleave)["cp_interleave"]
    own = [t for t in range(begin + count) if t // interleave % ranks == rank]
    for key, token in enumerate(own):
        if token >= begin:
            place = sequence, key
            if page_size is not None:
                page = int(call["block_table"][sequence, key // page_size])
                place = page, key % page_size
            call["k_cache"][place] = call["v_cache"][place] = 5.0


def test_rope_turns_by_the_total_position(device):
    """As one rank with all tokens would: q on every rank, k where it is written."""
    case = make_case(device, sharp_dtype(device), lengths=(90, 40), capacity=96, seqlen_q=3,
                     poison=None)  # fmt: skip
    angles = torch.outer(torch.arange(96), 0.1 * torch.arange(1, 33)).to(case["q"].device)
    tables = angles.cos(), angles.sin()
    k, v = case["k_cache"][:, :3] + 1, case["v_cache"][:, :3] + 1
    before = int32([87, 30], device)
    whole = case["q"].clone(), case["k_cache"].clone(), case["v_cache"].clone()
    leanattn.rope_append_kv(whole[0], k, v, *whole[1:], before, None, *tables)
    for ranks, interleave in DEALINGS:
        for rank in range(ranks):
            call = deal(case, ranks, rank, interleave)
            q = case["q"].clone()
            leanattn.rope_append_kv(
                q, k, v, call["k_cache"], call["v_cache"], before, None, *tables,
                **context_parallel(case, ranks, rank, interleave),
            )  # fmt: skip
            assert_same_bits(q, whole[0])
            for name, cache in zip(("k_cache", "v_cache"), whole[1:]):
                assert_same_bits(call[name], part_of(cache, ranks, rank, interleave))


def test_appended_tokens_beyond_all_ranks_are_not_written(device):
    case = make_case(device, sharp_dtype(device), lengths=(1,), capacity=10, poison=None)
    rows = case["k_cache"][:, :4] + 1
    for rank in range(2):  # 10 + 10 tokens, by 4 in turn: rank 0 is full after 18 tokens
        caches = case["k_cache"].clone(), case["v_cache"].clone()
        leanattn.append_kv(rows, rows, *caches, int32([17], device), cp_world_size=2, cp_rank=rank,
                           cp_interleave=4)  # fmt: skip
        changed = (caches[0] != case["k_cache"]).flatten(2).any(-1)[0].nonzero().flatten().tolist()
        assert changed == ([9] if rank == 0 else [])


# --- Errors --------------------------------------------------------------------------------------

MISTAKES = {
    "no-rank": (dict(cp_world_size=0), "cp_world_size", "0"),
    "negative-rank": (dict(cp_world_size=2, cp_rank=-1), "cp_rank", "-1"),
    "rank-beyond": (dict(cp_world_size=2, cp_rank=2), "cp_rank", "2"),
    "rank-of-one": (dict(cp_rank=1), "cp_rank", "1"),
    "no-interleave": (dict(cp_world_size=2, cp_interleave=0), "cp_interleave", "0"),
    "round-of-2-to-the-31": (
        dict(cp_world_size=2, cp_interleave=2**30), "cp_interleave", str(2**30),
    ),
    "huge": (dict(cp_world_size=2**62, cp_interleave=2**62), "cp_world_size", str(2**62)),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, device):
    """Each is told by every op that has the arguments, before it writes."""
    options, argument, value = MISTAKES[name]
    case = make_case(device, sharp_dtype(device), poison=None)
    rows = case["k_cache"][:, :1] + 1
    caches = case["k_cache"].clone(), case["v_cache"].clone()
    tables = torch.ones(2, 8, 4, device=rows.device)
    lengths = case["cache_seqlens"]
    calls = {
        "decode": lambda: leanattn.decode(**case, **options),
        "append_kv": lambda: leanattn.append_kv(rows, rows, *caches, lengths, **options),
        "rope_append_kv": lambda: leanattn.rope_append_kv(
            rows.clone(), rows, rows, *caches, lengths, None, *tables, **options
        ),
    }
    for op, call in calls.items():
        with pytest.raises(RuntimeError) as raised:
            call()
        message = str(raised.value)
        assert f"leanattn::{op}: {argument} " in message and f"got {value}" in message
    assert_same_bits(caches[0], case["k_cache"])
    supported, reason = leanattn.is_supported(**case, **options)
    assert not supported and argument in reason


def test_dtype_of_the_merge(device):
    """float32 states may be rounded to 16 bits; nothing else changes."""
    outs, lses = (torch.randn(3, 5, 2, *more, device=device) for more in ((24,), ()))
    out, lse = leanattn.merge_states(outs, lses)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded, again = leanattn.merge_states(outs, lses, dtype=dtype)
        assert_same_bits(rounded, out.to(dtype))
        assert_same_bits(again, lse)
        half = outs.to(dtype)
        assert leanattn.merge_states(half, lses, dtype=dtype)[0].dtype == dtype
    for given, wanted in ((torch.float32, torch.float64), (torch.float16, torch.float32)):
        with pytest.raises(RuntimeError, match="merge_states: dtype must be outs'"):
            leanattn.merge_states(outs.to(given), lses, dtype=wanted)


def test_check_mode_counts_all_ranks(monkeypatch, device):
    """LEANATTN_CHECK=1 takes total lengths, and looks at the pages of a rank's own tokens."""
    monkeypatch.setenv("LEANATTN_CHECK", "1")
    case = make_case(device, sharp_dtype(device), lengths=(200, 60), capacity=256)
    for rank in range(2):
        call = deal(case, 2, rank, 64, page_size=16) | context_parallel(case, 2, rank, 64)
        leanattn.decode(**call)
        for length, argument in ((257, "cache_seqlens"), (-1, "cache_seqlens")):
            wrong = call | {"cache_seqlens": int32([length, 60], device)}
            with pytest.raises(RuntimeError, match=argument):
                leanattn.decode(**wrong)
        # Of 60 tokens rank 0 has all, rank 1 none: its entries are not looked at.
        call["block_table"][1] = 2147480000
        if rank == 1:
            leanattn.decode(**call)
        else:
            with pytest.raises(RuntimeError, match="block_table"):
                leanattn.decode(**call)
        rows = case["k_cache"][:, :1].nan_to_num() + 1
        append = dict(k=rows, v=rows, k_cache=call["k_cache"], v_cache=call["v_cache"],
                      block_table=call["block_table"],
                      **context_parallel(case, 2, rank, 64))  # fmt: skip
        # Token 100 is rank 1's: rank 0 does not ask for its page.
        leanattn.append_kv(**append, cache_seqlens=int32([200, 100 if rank == 0 else 30], device))
        with pytest.raises(RuntimeError, match="block_table"):
            lengths = int32([200, 30 if rank == 0 else 100], device)
            leanattn.append_kv(**append, cache_seqlens=lengths)
