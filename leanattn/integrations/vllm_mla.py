"""leanattn as vLLM's attention backend of latent models (MLA): decodes are leanattn's, with the
values as the first columns of the keys, and prefills stay vLLM's."""

import dataclasses

import torch
import vllm.envs as envs
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType

from leanattn.integrations.vllm_attention import (
    NAME,
    LeanAttentionBackend,
    reason_against,
    uniform_query_len,
)

_FLOAT8 = ("fp8", "fp8_e4m3")  # vLLM views the cache as e4m3 whatever it is


class LeanMLABackend(MLACommonBackend):
    supported_dtypes = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16", *_FLOAT8]

    @staticmethod
    def get_name():
        return NAME

    @staticmethod
    def get_impl_cls():
        return LeanMLAImpl

    @staticmethod
    def get_builder_cls():
        return LeanMLAMetadataBuilder

    get_supported_kernel_block_sizes = staticmethod(
        LeanAttentionBackend.get_supported_kernel_block_sizes
    )

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension=False):
        return (1, 0, 2, 3) if include_num_layers_dimension else (0, 1, 2)

    @classmethod
    def supports_compute_capability(cls, capability):
        # Others have 99 KB of shared memory a CTA, too few for head dims beyond 256.
        return capability == DeviceCapability(8, 0) or capability.major in (9, 10)

    @classmethod
    def supports_combination(
        cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse,
        use_mm_prefix, device_capability,
    ):  # fmt: skip
        return reason_against(head_size, kv_cache_dtype)

    supports_batch_invariance = classmethod(lambda cls: True)


@dataclasses.dataclass
class LeanMLADecodeMetadata(MLACommonDecodeMetadata):
    query_start_loc: torch.Tensor  # [num_decodes + 1] int32
    query_len: int | None  # of each sequence, None where they differ


class LeanMLAMetadataBuilder(MLACommonMetadataBuilder[MLACommonMetadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    query_len_support = QueryLenSupport.VARLEN

    def _build_decode(
        self, block_table_tensor, seq_lens_device, max_seq_len, query_start_loc_cpu,
        query_start_loc_device, num_decode_tokens, dcp_tot_seq_lens_device,
    ):  # fmt: skip
        return LeanMLADecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            query_start_loc=query_start_loc_device,
            query_len=uniform_query_len(query_start_loc_cpu, num_decode_tokens),
        )


class LeanMLAImpl(MLACommonImpl[MLACommonMetadata]):
    can_return_lse_for_decode = True

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
        kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, **mla_args,
    ):  # fmt: skip
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
            kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name, **mla_args,
        )  # fmt: skip
        given = dict(
            alibi_slopes=alibi_slopes, sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
        )  # fmt: skip
        for name, value in given.items():
            if value:
                raise NotImplementedError(
                    f"leanattn: {name} is not supported for latent models, got {value}"
                )
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(
                f"leanattn: attn_type must be 'decoder' for latent models, got {attn_type!r}"
            )
        self.supports_quant_query_input = False
        self._float8 = kv_cache_dtype in _FLOAT8
        self._options = dict(
            softmax_scale=self.scale, batch_invariant=bool(envs.VLLM_BATCH_INVARIANT)
        )

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        """The decodes of a step.

        Args:
            q: `[num_tokens, num_heads, kv_lora_rank + qk_rope_head_dim]`, or its two parts.
            kv_c_and_k_pe_cache: `[num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]`.

        Returns:
            (out `[num_tokens, num_heads, kv_lora_rank]`, lse `[num_tokens, num_heads]` fp32, of
            natural logarithms, or None where vLLM needs none)
        """
        if isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        m = attn_metadata.decode
        keys = kv_c_and_k_pe_cache.unsqueeze(2)
        values = keys[..., : self.kv_lora_rank]
        options = dict(self._options)
        if self._float8:
            options.update(k_scale=layer._k_scale, v_scale=layer._k_scale)
        if m.query_len is None:
            options.update(cu_seqlens_q=m.query_start_loc)
        else:
            q = q.unflatten(0, (-1, m.query_len))
        arguments = q, keys, values, m.seq_lens, m.block_table
        if self.need_to_return_lse_for_decode:
            out, lse = torch.ops.leanattn.decode_with_lse(*arguments, **options)
            lse = lse.flatten(0, -2)
        else:
            out, lse = torch.ops.leanattn.decode(*arguments, **options), None
        return out.flatten(0, -3), lse
