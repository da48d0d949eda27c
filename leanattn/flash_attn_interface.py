"""FlashAttention-3's functions, in the order of its arguments: `leanattn.flash_attn_interface` in
place of `flash_attn_interface`.

They are those of leanattn.flash_attn, whose documentation they share. What FlashAttention-3 alone
has: `scheduler_metadata`, `num_splits`, `pack_gqa` and `sm_margin` are hints that results never
depend on; `qv`, `attention_chunk`, `seqused_q` and scales of float8 queries are refused by name.
"""

from leanattn import flash_attn
from leanattn.flash_attn.arguments import refuse_unknown
from leanattn.ops import merge_states


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """`leanattn.flash_attn.flash_attn_func`; returns out, or (out, lse)."""
    refuse_unknown(
        "flash_attn_func", qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        attention_chunk=attention_chunk,
    )  # fmt: skip
    return _without_probabilities(
        flash_attn.flash_attn_func(
            q, k, v, 0.0, softmax_scale, causal, window_size, softcap, None, deterministic,
            return_attn_probs,
        )
    )  # fmt: skip


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
    seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
    v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
    pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """`leanattn.flash_attn.flash_attn_varlen_func`; returns out, or (out, lse)."""
    refuse_unknown(
        "flash_attn_varlen_func", seqused_q=seqused_q, qv=qv, q_descale=q_descale,
        k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk,
    )  # fmt: skip
    return _without_probabilities(
        flash_attn.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale,
            causal, window_size, softcap, None, deterministic, return_attn_probs,
            seqused_k=seqused_k,
        )
    )  # fmt: skip


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
    cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None,
    cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None,
    q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    """`leanattn.flash_attn.flash_attn_with_kvcache`."""
    return flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
        cache_leftpad, None, softmax_scale, causal, window_size, softcap, rotary_interleaved, None,
        num_splits, return_softmax_lse, page_table=page_table, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new, max_seqlen_q=max_seqlen_q, qv=qv,
        rotary_seqlens=rotary_seqlens, q_descale=q_descale, k_descale=k_descale,
        v_descale=v_descale, attention_chunk=attention_chunk,
        scheduler_metadata=scheduler_metadata, pack_gqa=pack_gqa, sm_margin=sm_margin,
    )  # fmt: skip


def flash_attn_combine(out_partial, lse_partial):
    """`leanattn.merge_states` of out_partial `[n, B, S, H, D]` and lse_partial `[n, B, S, H]`."""
    return merge_states(out_partial, lse_partial)


def get_scheduler_metadata(*arguments, **options):
    """None: nothing is planned ahead, and `scheduler_metadata` changes nothing."""
    return None


def _without_probabilities(result):
    return result[:2] if isinstance(result, tuple) else result
