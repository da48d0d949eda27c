"""torch's DTensor: decode with its heads shared out over a device mesh, each rank its own.

    torch.distributed.tensor.DTensor    q Shard(q.dim() - 2), k_cache and v_cache Shard(2)

Importing leanattn registers the rule where torch.distributed.tensor is imported.
"""

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from leanattn.ops import named_arguments

_ops = torch.ops.leanattn

# Where an argument has heads: the dimension, counted from the end.
_HEADS = dict(q=2, k_cache=2, v_cache=2, alibi_slopes=1, sinks=1, k_scale=1, v_scale=1)


def _register(op):
    num_outputs = len(op._schema.returns)

    @register_sharding(op)
    def placements(*args, **kwargs):
        """[(outputs' placements, arguments' placements)], any of which will do; of arguments that
        are no tensors None."""
        given = named_arguments(op, args, kwargs)
        choices = _choices(given)
        # DTensor moves what is given by position to where it has to be, and only that.
        for name in kwargs:
            if _is_tensor(given[name]):
                choices = [c for c in choices if c[name] in given[name].placements]
                if not choices:
                    raise RuntimeError(
                        f"{op.name()}: {name} must be sharded as the heads of q, k_cache and "
                        f"v_cache are, or replicated if they are, got {given[name].placements}"
                    )
        return [
            (
                [choice["outputs"]] * num_outputs,
                [choice[name] if _is_tensor(value) else None for name, value in given.items()],
            )
            for choice in choices
        ]


def _is_tensor(value):
    return hasattr(value, "placements")


def _choices(given):
    """[{argument's name: placement}], and that of the outputs under "outputs"."""
    q, k_cache = given["q"], given["k_cache"]
    names = (*given, "outputs")
    choices = [dict.fromkeys(names, Replicate())]
    heads_q, heads_kv, ranks = q.shape[-2], k_cache.shape[-2], q.mesh.size()
    # Each rank must have whole groups, or the one KV head there is.
    if heads_kv % ranks == 0 or (heads_kv == 1 and heads_q % ranks == 0):
        by_heads = {name: _by_heads(name, value, heads_kv) for name, value in given.items()}
        # lse is out without its last dimension: both have their heads where q has.
        choices.append(by_heads | {"outputs": Shard(q.ndim - 2)})
    return choices


def _by_heads(name, value, heads_kv):
    if name not in _HEADS or not _is_tensor(value):
        return Replicate()
    dim = value.ndim - _HEADS[name]
    is_of_kv = name not in ("q", "alibi_slopes", "sinks")
    if is_of_kv and (heads_kv == 1 or dim < 0 or value.shape[dim] == 1):
        return Replicate()  # one for all heads
    return Shard(dim)


_register(_ops.decode.default)
_register(_ops.decode_with_lse.default)
