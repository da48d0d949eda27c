"""Hugging Face transformers: attn_implementation="leanattn", registered by importing this module.

Decode steps go to torch.ops.leanattn.decode, prefill and training to SDPA; shapes decide. What a
decode step sees is worked out once a forward, on the device, by `decode_mask` and shared by all
layers. It stands where transformers passes masks, as a tensor of four dimensions, for only such a
one passes through `generate` and torch.compile untouched:

    lengths   [B, 1, 1, 1]  every sequence sees a prefix of the cache: how many tokens
    pages     [B, 1, 2, T]  any other mask of one query, with padding for instance
                            [:, :, 0]        the tokens that are seen, then those that are not
                            [:, :, 1, 0]     how many are seen

T is the cache's capacity, of which nothing but the tokens seen is read. The op knows prefixes only;
with `pages` it takes the cache as a paged one whose pages hold one token each, in any order.

Both are uint32, of which torch has copies and views but hardly any arithmetic, and `pages` has two
rows for one query: a model that changes its mask instead of handing it on fails, where another
dtype would let it compute something else.
"""

import functools
import inspect

import torch
import transformers
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from leanattn.integrations.own_attention import (
    check_models,
    own_attention,
    refuse_own_attention,
)
from leanattn.integrations.token_pages import as_token_pages
from leanattn.sdpa import MAX_QUERIES, backend_override, unsupported

# Until 5.3 masks were asked for in another way, though all that is imported here is there.
if "q_length" not in inspect.signature(sdpa_mask).parameters:
    raise ImportError(f"{__name__} needs transformers >= 5.4, got {transformers.__version__}")

NAME = "leanattn"

_decode = torch.ops.leanattn.decode

# Models of these layers do no more with an attention mask than hand it to the attention function;
# sparse ones look into it.
_LAYER_TYPES = {
    "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "moe",
    "hybrid", "hybrid_sliding",
}  # fmt: skip


# Models that change the mask that they were given before they hand it on.
_MASK_EDITORS = {"doge", "t5gemma2_decoder"}

# By which models tell an attention function of keys to leave out, or of sinks, and not by the mask.
_UNKNOWN_ARGUMENTS = ("indices", "block_indices", "sinks")


def register():
    """Makes `attn_implementation="leanattn"` known to transformers. Importing this does it too."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, decode_mask)
    check_models(NAME)


# --- Masks ---------------------------------------------------------------------------------------


def decode_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=causal_mask_function,
    attention_mask=None, local_size=None, config=None, device="cpu", **options,
):  # fmt: skip
    """What a forward's queries see, in the form that `attention_forward` takes.

    Args:
        batch_size: B.
        q_length: new tokens of each sequence; up to MAX_QUERIES they are a decode step.
        kv_length: T, tokens that the cache gives to attention, its unused capacity included.
        q_offset: position of the first query, an int or, from a static cache, a tensor.
        kv_offset: position of the cache's first token.
        mask_function: transformers' rule for one query and key.
        attention_mask: `[B, n]` bool, False where padding is.
        local_size: window of sliding layers, chunk of chunked ones.
        config: of the model.
        device: of the result.

    Returns:
        `lengths` or `pages`, see above; for a prefill, and where several queries meet padding or a
        window, what transformers gives to SDPA: `[B, 1, q_length, T]` bool, or None.
    """
    arguments = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
        kv_offset=kv_offset, mask_function=mask_function, attention_mask=attention_mask,
        local_size=local_size, config=config, device=device,
    )  # fmt: skip
    _check_model(config)
    if getattr(config, "num_kv_shared_layers", 0):
        # Layers that share keys may drop queries, and then need to be told what the rest sees.
        options["allow_is_causal_skip"] = False
    decode_step = q_length <= MAX_QUERIES and q_length < kv_length
    plain = _LAYER_TYPES.issuperset(getattr(config, "layer_types", None) or ())
    if not decode_step or not plain or getattr(config, "model_type", None) in _MASK_EDITORS:
        return sdpa_mask(**arguments, **options)
    if attention_mask is None and _sees_prefix(mask_function, kv_length, local_size):
        length = q_offset + q_length - kv_offset
        if not isinstance(length, torch.Tensor):
            if q_length == 1 and length == kv_length:
                return None
            length = torch.full((1,), length, dtype=torch.int32, device=device)
        length = length.to(device=device, dtype=torch.int32)
        return length.view(torch.uint32).view(1, 1, 1, 1).expand(batch_size, 1, 1, 1)
    # Whether a mask could be left out depends on its content: asking would wait for the device.
    options["allow_is_causal_skip"] = False
    if attention_mask is not None:
        options["allow_is_bidirectional_skip"] = False
    mask = sdpa_mask(**arguments, **options)
    return _pages(mask[:, 0, 0]) if q_length == 1 and mask is not None else mask


def _check_model(config):
    """Refuses the models that `check_models` refuses where the name was written into a config by
    hand. While dynamo traces, the model has been here before, or will be."""
    if not torch.compiler.is_compiling() and config is not None:
        model = _model_of_own_attention(type(config))
        if model is not None:
            refuse_own_attention(model, NAME)


@functools.lru_cache
def _model_of_own_attention(config_type):
    """A class of models with such a config, if all of them have attention of their own, or None."""
    models = [m for m in _subclasses(PreTrainedModel) if m.config_class is config_type]
    if any(own_attention(model, NAME) is None for model in models):
        return None
    return models[-1] if models else None


def _subclasses(parent):
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


def _sees_prefix(mask_function, kv_length, local_size):
    """Whether every query sees all keys up to its own, as far as the host knows."""
    if mask_function is causal_mask_function:
        return True
    return local_size is not None and kv_length <= local_size and _is_sliding(mask_function)


def _is_sliding(mask_function):
    """Whether transformers made this mask by sliding_window_causal_mask_function, and no more.

    Functions that are made while dynamo traces cannot be looked into: not known then.
    """
    if torch.compiler.is_compiling() or mask_function.__code__ is not _A_SLIDING_MASK.__code__:
        return False
    rules, known = (f.__closure__[0].cell_contents for f in (mask_function, _A_SLIDING_MASK))
    return [rule.__code__ for rule in rules] == [rule.__code__ for rule in known]


_A_SLIDING_MASK = sliding_window_causal_mask_function(1)


def _pages(visible):
    """`pages` of visible, `[B, T]` bool."""
    tokens = torch.arange(visible.shape[1], device=visible.device)
    seen = visible.sum(1, keepdim=True)
    places = torch.where(visible, visible.cumsum(1) - 1, seen + (~visible).cumsum(1) - 1)
    table = torch.empty_like(places).scatter_(1, places, tokens.expand_as(places))
    return (
        torch.stack((table, seen.expand_as(table)), 1).to(torch.int32).view(torch.uint32)[:, None]
    )


def _decoded(mask):
    """`lengths` or `pages` in int32, or None if the mask is something else. A caller's own lengths
    are int32 already."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    if mask.dtype == torch.uint32:
        return mask.view(torch.int32)
    return mask if mask.dtype == torch.int32 and mask.shape[1:] == (1, 1, 1) else None


def _bool_mask(mask, q_length, kv_length):
    """The [B, 1, Sq, T] bool mask of decoded `lengths` or `pages`, for SDPA."""
    tokens = torch.arange(kv_length, device=mask.device)
    if mask.shape[2] == 1:
        rows = torch.arange(q_length, device=mask.device)[:, None]
        return tokens < mask - (q_length - 1) + rows
    visible = tokens < mask[:, 0, 1]
    return torch.empty_like(visible).scatter_(1, mask[:, 0, 0].long(), visible)[:, None, None]


# --- Attention -----------------------------------------------------------------------------------


def attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, softcap=None, s_aux=None,
    **kwargs,
):  # fmt: skip
    """The attention function of transformers.

    Args:
        query: `[B, Hq, Sq, D]`.
        key, value: `[B, Hkv, T, D]`, the cache.
        attention_mask: of `decode_mask`.
        dropout, scaling, softcap: as models pass them.
        s_aux: `[Hq]`, sinks.

    Returns:
        (`[B, Sq, Hq, Dv]`, None)
    """
    for name in _UNKNOWN_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"leanattn: {type(module).__name__} gives its attention `{name}`, which leanattn "
                'does not know: use attn_implementation="sdpa" or "eager"'
            )
    decoded = _decoded(attention_mask)
    is_step = decoded is not None or (attention_mask is None and query.shape[2] == 1)
    if is_step and dropout == 0.0 and kwargs.get("position_bias") is None:
        out = _decode_step(query, key, value, decoded, scaling, softcap, s_aux)
        if out is not None:
            return out, None
    if decoded is not None:
        attention_mask = _bool_mask(decoded, query.shape[2], key.shape[2])
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out = _plain_attention(
        query, key, value, attention_mask, is_causal, dropout, scaling, softcap, s_aux
    )
    return out, None


def _decode_step(query, key, value, mask, scaling, softcap, sinks):
    """[B, Sq, Hq, Dv] by the op, or None if it does not take this. The mask is a decoded one."""
    if backend_override() == "torch" or unsupported(query, key, value) is not None:
        return None
    options = dict(softmax_scale=scaling, softcap=softcap or 0.0)
    if sinks is not None:
        if sinks.requires_grad and torch.is_grad_enabled():
            return None
        options["sinks"] = sinks.float()
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if mask is None:
        return _decode(query, key, value, **options)
    if mask.shape[2] == 1:
        return _decode(query, key, value, mask[:, 0, 0, 0], **options)
    if mask.shape[3] != key.shape[1]:
        raise ValueError(
            f"leanattn: the mask is of {mask.shape[3]} tokens, the cache has {key.shape[1]}"
        )
    pages = as_token_pages(key, value) or as_token_pages(_heads_first(key), _heads_first(value))
    if pages is None:
        return None
    key, value, sequence_step, token_step = pages
    table = mask[:, 0, 0]
    if token_step != 1:
        table = table * token_step
    if query.shape[0] > 1:
        sequences = torch.arange(query.shape[0], dtype=torch.int32, device=key.device)
        table = table + sequence_step * sequences[:, None]
    return _decode(query, key, value, mask[:, 0, 1, 0], table, **options)


def _heads_first(cache):
    """`[B, T, Hkv, D]` as it lies in transformers' caches, copied if it lies in another way: latent
    models make V anew each step, and lay it out unlike K."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


# Scores that a prefill with softcap or sinks holds at a time; 2^28 fp32 numbers are a GiB.
_MAX_SCORES = 2**28


def _plain_attention(query, key, value, mask, is_causal, dropout, scaling, softcap, sinks):
    """[B, Sq, Hq, Dv] in plain torch: prefill and training with what SDPA has not, softcap and
    sinks. Some query rows at a time, for the scores are all written out."""
    batch, heads, q_length, _ = query.shape
    if mask is None and is_causal and q_length > 1:
        # As SDPA's is_causal: aligned to the top left, so that later keys are unused capacity.
        key, value = key[:, :, :q_length], value[:, :, :q_length]
        tokens = torch.arange(key.shape[2], device=key.device)
        mask = (tokens <= torch.arange(q_length, device=key.device)[:, None])[None, None]
    rows = max(1, _MAX_SCORES // (batch * heads * key.shape[2]))
    if torch.compiler.is_compiling() or rows >= q_length:
        return _plain_rows(query, key, value, mask, dropout, scaling, softcap, sinks)
    out = []
    for begin in range(0, q_length, rows):
        part = slice(begin, begin + rows)
        rows_mask = None if mask is None else mask[:, :, part]
        out.append(
            _plain_rows(query[:, :, part], key, value, rows_mask, dropout, scaling, softcap, sinks)
        )
    return torch.cat(out, 1)


def _plain_rows(query, key, value, mask, dropout, scaling, softcap, sinks):
    heads, q_length, dim = query.shape[1:]
    group_size = heads // key.shape[1]
    scale = dim**-0.5 if scaling is None else scaling
    grouped = query.unflatten(1, (-1, group_size)).flatten(2, 3)
    scores = (grouped @ key.transpose(2, 3)).unflatten(2, (group_size, q_length)).flatten(1, 2)
    scores = scores.float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
        else:
            scores = scores + mask
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = torch.nn.functional.dropout(weights, dropout).to(value.dtype)
    weights = weights.unflatten(1, (-1, group_size)).flatten(2, 3)
    out = (weights @ value).unflatten(2, (group_size, q_length))
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


register()
