"""leanattn as one of vLLM's attention backends, on the base classes of vLLM 0.26.

Which call a step becomes is decided once a step, by the builder, and is the same for all layers:

    uniform   every sequence has as many queries: `[B, Sq, Hq, D]`, the form of the lean kernels
    ragged    the whole batch in one call, by cu_seqlens_q
    split     in a step that is not in a CUDA graph: the sequences of few queries, which vLLM puts
              first, as one of the above, and the others, of a prefill, by vLLM's FlashAttention

A graph fixes the number of sequences and of tokens and nothing else, unless vLLM keeps graphs of
their own for uniform steps, as by default: those are captured uniform. All others are captured
ragged, where the device alone looks at how many queries a sequence has.
"""

import copy
import dataclasses

import torch
import vllm.envs as envs
from vllm import _custom_ops as vllm_ops
from vllm.config import CUDAGraphMode
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import get_kv_cache_layout, split_decodes_and_prefills

import leanattn.ops  # noqa: F401  registers torch.ops.leanattn
from leanattn.integrations.vllm_context import ContextParallel

NAME = "CUSTOM"

_FLOAT8 = {
    "fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip

_decode_out = torch.ops.leanattn.decode_out


class LeanAttentionBackend(AttentionBackend):
    supported_dtypes = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16", *_FLOAT8]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name():
        return NAME

    @staticmethod
    def get_impl_cls():
        return LeanAttentionImpl

    @staticmethod
    def get_builder_cls():
        return LeanAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes():
        # Any size; named are those that vLLM may choose itself, where a window leaves it the
        # choice: of multiples of 1 it would take 1.
        return [16, 32, 64, 128, MultipleOf(1)]

    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"):
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension=False):
        """Blocks first; then tokens before heads or, with VLLM_KV_CACHE_LAYOUT=HND, after them."""
        tokens_first = get_kv_cache_layout() == "NHD"
        if include_num_layers_dimension:
            return (1, 0, 3, 2, 4) if tokens_first else (1, 2, 0, 3, 4)
        return (0, 2, 1, 3) if tokens_first else (0, 1, 2, 3)

    @classmethod
    def supports_head_size(cls, head_size):
        return head_size % 8 == 0 and 0 < head_size <= 256

    @classmethod
    def supports_attn_type(cls, attn_type):
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)

    @classmethod
    def supports_compute_capability(cls, capability):
        return capability >= DeviceCapability(8, 0)

    @classmethod
    def supports_combination(
        cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse,
        use_mm_prefix, device_capability,
    ):  # fmt: skip
        return reason_against(head_size, kv_cache_dtype)

    supports_sink = classmethod(lambda cls: True)
    supports_sliding_window = classmethod(lambda cls: True)
    supports_non_causal = classmethod(lambda cls: True)
    supports_batch_invariance = classmethod(lambda cls: True)
    supports_per_head_quant_scales = classmethod(lambda cls: True)


def reason_against(head_size, kv_cache_dtype):
    """Why leanattn cannot serve layers that it could in another build or with another cache; None
    if it can."""
    if torch.cuda.is_available() and "cuda" not in torch.ops.leanattn.build_info():
        return "this build of leanattn has no CUDA kernels"
    if kv_cache_dtype in _FLOAT8 and head_size % 16:
        return f"fp8 caches need a head_size that is a multiple of 16, got {head_size}"
    return None


@dataclasses.dataclass
class LeanAttentionMetadata(AttentionMetadata):
    """What a step's calls need. The tensors are vLLM's own, or slices of them."""

    # Of the whole step, for vLLM and its connectors.
    num_actual_tokens: int
    slot_mapping: torch.Tensor
    # What goes to leanattn: the first sequences, which are all of them unless there is a prefill.
    num_seqs: int
    num_tokens: int
    query_len: int | None  # of each of them, None where they differ
    query_start_loc: torch.Tensor  # [num_seqs + 1] int32
    seq_lens: torch.Tensor  # [num_seqs] int32
    block_table: torch.Tensor  # [num_seqs, max_blocks] int32
    causal: bool
    prefill: AttentionMetadata | None = None  # of vLLM's FlashAttention
    context: object | None = None  # ContextMetadata, with decode context parallelism


class LeanAttentionMetadataBuilder(AttentionMetadataBuilder[LeanAttentionMetadata]):
    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        model_config = vllm_config.model_config
        if getattr(model_config, "rswa_window", None) is not None:
            raise ValueError(
                "leanattn does not support reference sliding windows, and this model has one of "
                f"{model_config.rswa_window} tokens: leave --attention-backend away"
            )
        self._init_reorder_batch_threshold(
            1, supports_spec_as_decode=True, supports_dcp_with_varlen=True
        )
        self.context = ContextParallel.of_group(vllm_config, device)
        # A graph reads each builder's own lengths of the context, which `build` alone refreshes.
        self.supports_update_block_table = self.context is None

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        m = common_attn_metadata
        if isinstance(m.causal, torch.Tensor):
            raise NotImplementedError(
                "leanattn: causal for some sequences and not for others is not supported"
            )
        num_seqs, num_tokens = m.num_reqs, m.num_actual_tokens
        prefill = None
        if m.max_query_len > self.reorder_batch_threshold and self._flash_takes_prefills():
            num_seqs, _, num_tokens, _ = split_decodes_and_prefills(m, self.reorder_batch_threshold)
            if num_seqs < m.num_reqs:
                prefill = _flash_metadata(m, num_seqs, num_tokens)
        metadata = LeanAttentionMetadata(
            num_actual_tokens=m.num_actual_tokens,
            slot_mapping=m.slot_mapping,
            num_seqs=num_seqs,
            num_tokens=num_tokens,
            query_len=uniform_query_len(m.query_start_loc_cpu[: num_seqs + 1], num_tokens),
            query_start_loc=m.query_start_loc[: num_seqs + 1],
            seq_lens=m.seq_lens[:num_seqs],
            block_table=m.block_table_tensor[:num_seqs],
            causal=m.causal,
            prefill=prefill,
        )
        if self.context is not None:
            metadata.context = self.context.build(m, metadata, self._capturing)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata):
        """Of a graph that vLLM will replay with any lengths and tables, and, unless it is one of
        uniform steps, with any number of queries in each sequence."""
        uniform_alone = self._graphs_are_uniform()
        self._capturing = True
        try:
            metadata = self.build(0, common_attn_metadata)
        finally:
            self._capturing = False
        if not uniform_alone:
            metadata.query_len = None
        return metadata

    def update_block_table(self, metadata, blk_table, slot_mapping):
        metadata = copy.copy(metadata)
        metadata.slot_mapping = slot_mapping
        metadata.block_table = blk_table[: metadata.num_seqs]
        if metadata.prefill is not None:
            metadata.prefill = copy.copy(metadata.prefill)
            metadata.prefill.block_table = blk_table[metadata.num_seqs :]
        return metadata

    # Whether what is built now goes into a graph.
    _capturing = False

    def _graphs_are_uniform(self):
        mode = self.vllm_config.compilation_config.cudagraph_mode
        return mode is not None and mode.mixed_mode() != CUDAGraphMode.FULL

    def _flash_takes_prefills(self):
        # Batch-invariant: leanattn's bits do not depend on how a prompt was cut into chunks either.
        if self._capturing or envs.VLLM_BATCH_INVARIANT or self.kv_cache_spec.block_size % 16:
            return False
        layers = self.vllm_config.compilation_config.static_forward_context
        return all(layers[name].impl.flash is not None for name in self.layer_names)


def uniform_query_len(query_start_loc_cpu, num_tokens):
    """How many queries each sequence has, None where they differ or are not all of num_tokens.

    Args:
        query_start_loc_cpu: `[num_seqs + 1]` int32 on the host.
    """
    num_seqs = query_start_loc_cpu.shape[0] - 1
    if num_tokens == 0 or num_tokens % num_seqs:
        return None
    query_len = num_tokens // num_seqs
    return query_len if bool((query_start_loc_cpu.diff() == query_len).all()) else None


def _flash_metadata(m, num_seqs, num_tokens):
    """FlashAttention's metadata of all sequences but the first num_seqs, with their num_tokens."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    return FlashAttentionMetadata(
        num_actual_tokens=m.num_actual_tokens - num_tokens,
        max_query_len=m.max_query_len,
        query_start_loc=m.query_start_loc[num_seqs:] - num_tokens,
        max_seq_len=m.max_seq_len,
        seq_lens=m.seq_lens[num_seqs:],
        block_table=m.block_table_tensor[num_seqs:],
        slot_mapping=m.slot_mapping[num_tokens:],
        use_cascade=False,
        common_prefix_len=0,
        cu_prefix_query_lens=None,
        prefix_kv_lens=None,
        suffix_kv_lens=None,
        causal=m.causal,
    )


class LeanAttentionImpl(AttentionImpl[LeanAttentionMetadata]):
    can_return_lse_for_decode = True

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None,
        sliding_window=None, kv_cache_dtype="auto", logits_soft_cap=None,
        attn_type=AttentionType.DECODER, kv_sharing_target_layer_name=None, sinks=None,
    ):  # fmt: skip
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        if self.dcp_world_size > 1 and (sliding_window is not None or alibi_slopes is not None):
            raise NotImplementedError(
                "leanattn: with decode context parallelism a rank has every few tokens of a "
                "sequence, of which sliding windows and ALiBi cannot tell the distance"
            )
        if alibi_slopes is not None:
            alibi_slopes = torch.tensor(alibi_slopes, dtype=torch.float32)
        self._options = dict(
            softmax_scale=self.scale,
            softcap=float(logits_soft_cap or 0.0),
            alibi_slopes=alibi_slopes,
            batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        )
        self._float8 = _FLOAT8.get(kv_cache_dtype)
        self.process_weights_after_loading()
        self.flash = self._make_flash()

    def process_weights_after_loading(self, act_dtype=None):
        """vLLM calls it when the weights have come. Sinks are one, and the op wants fp32."""
        self._sinks = None if self.sinks is None else self.sinks.detach().float()

    def _make_flash(self):
        """vLLM's FlashAttention for the prefills of this layer, or None where it does not do."""
        from vllm.v1.attention.backends import fa_utils

        has_alibi = self._options["alibi_slopes"] is not None
        if (
            not fa_utils.is_flash_attn_varlen_func_available()
            or fa_utils.get_flash_attn_version(has_alibi, self.head_size) is None
            or (self.sinks is not None and not fa_utils.flash_attn_supports_sinks())
            or self._float8 is not None  # it would want quantised queries
            or self.dcp_world_size > 1
        ):
            return None
        from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

        slopes = self._options["alibi_slopes"]
        return FlashAttentionImpl(
            self.num_heads, self.head_size, self.scale, self.num_kv_heads,
            None if slopes is None else slopes.tolist(), self.sliding_window, self.kv_cache_dtype,
            self._options["softcap"] or None, self.attn_type, self.kv_sharing_target_layer_name,
            self.sinks,
        )  # fmt: skip

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None,
        output_block_scale=None,
    ):  # fmt: skip
        """The attention of a step.

        Args:
            query: `[num_tokens, num_heads, head_size]`.
            key, value: `[num_tokens, num_kv_heads, head_size]`, in the cache already; read with
                decode context parallelism only, where another rank's cache may have them.
            kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, or with K and V apart
                `[num_blocks, 2, block_size, num_kv_heads, head_size]` or `[2, num_blocks, ...]`;
                any strides. uint8 is viewed as the type that kv_cache_dtype names.
            attn_metadata: of the builder; None in a profiling run, which gives 0.
            output: like query.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("leanattn: a quantised output is not supported")
        if attn_metadata is None:
            return output.fill_(0)
        m = attn_metadata
        if self._float8 is not None:
            kv_cache = kv_cache.view(self._float8)
        k_cache, v_cache = self._split(kv_cache)
        options = self._options_of(layer, m.causal)
        if m.context is not None:
            n = m.num_tokens
            m.context.attend(
                query[:n], key[:n], value[:n], k_cache, v_cache, output[:n], m, options
            )
            return output
        if m.num_tokens:
            self._decode(query, k_cache, v_cache, output, m, options)
        if m.prefill is not None:
            n = m.num_tokens
            self.flash.forward(layer, query[n:], key, value, kv_cache, m.prefill, output=output[n:])
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        """Writes new tokens to their slots, in dummy runs to none.

        Args:
            key, value: `[num_tokens or more, num_kv_heads, head_size]`.
            slot_mapping: `[num_tokens]` int64, block * block_size + place; -1: not written.
        """
        if self.kv_sharing_target_layer_name is not None:
            return
        k_cache, v_cache = self._split(kv_cache)
        vllm_ops.reshape_and_cache_flash(
            key, value, k_cache, v_cache, slot_mapping, self.kv_cache_dtype, layer._k_scale,
            layer._v_scale,
        )  # fmt: skip

    def _split(self, kv_cache):
        """K and V, `[num_blocks, block_size, num_kv_heads, head_size]`, of the cache."""
        if kv_cache.dim() == 5:
            return kv_cache.unbind(1 if kv_cache.shape[1] == 2 else 0)
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1)

    def _options_of(self, layer, causal):
        options = dict(self._options, causal=causal, sinks=self._sinks)
        if self.sliding_window is not None:
            options["window_left"] = self.sliding_window - 1
            if not causal:
                options["window_right"] = self.sliding_window - 1
        if self._float8 is not None:
            options.update(k_scale=layer._k_scale, v_scale=layer._v_scale)
        return options

    def _decode(self, query, k_cache, v_cache, output, m, options):
        if m.num_tokens < query.shape[0]:
            query, output = query[: m.num_tokens], output[: m.num_tokens]
        if m.query_len is None:
            options.update(cu_seqlens_q=m.query_start_loc)
        elif m.query_len > 1:
            query, output = (x.unflatten(0, (m.num_seqs, m.query_len)) for x in (query, output))
        _decode_out(query, k_cache, v_cache, m.seq_lens, m.block_table, **options, out=output)


# What the classes above read of vLLM's metadata, and the parameters that they know.
_FIELDS = {
    "query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens",
    "max_query_len", "max_seq_len", "block_table_tensor", "slot_mapping", "causal",
}  # fmt: skip


def check_interface():
    """Raises AttributeError where vLLM's interface is not what the classes here are made for."""
    fields = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    if missing := sorted(_FIELDS - fields):
        raise AttributeError(f"CommonAttentionMetadata has no {', '.join(missing)}")
    for cls in (LeanAttentionBackend, LeanAttentionMetadataBuilder, LeanAttentionImpl):
        if missing := sorted(cls.__abstractmethods__):
            raise AttributeError(f"{cls.__name__} lacks {', '.join(missing)}")
