"""torch.vmap over decode: what it maps over becomes part of the batch, in one call.

Where no single call can say it, with ragged queries or each with sinks of its own, there is a call
for each.
"""

import torch
from torch._C._functorch import _add_batch_dim
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.vmap import unwrap_batched

from leanattn.ops import named_arguments

_ops = torch.ops.leanattn


def _register(op):
    def rule(keyset, *args, **kwargs):
        # As torch.library.register_vmap does it, which takes no tensor by keyword.
        interpreter = retrieve_current_functorch_interpreter()
        level, n = interpreter.level(), interpreter.batch_size()
        arguments, dims = unwrap_batched(named_arguments(op, args, kwargs), level)
        mapped = {
            name: arguments[name].movedim(dim, 0) for name, dim in dims.items() if dim is not None
        }
        batched = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
        with torch._C._ExcludeDispatchKeyGuard(batched):
            if not mapped:
                return op(**arguments)
            outputs = _map(op, n, arguments, mapped)
        if isinstance(outputs, tuple):
            return tuple(_add_batch_dim(output, 0, level) for output in outputs)
        return _add_batch_dim(outputs, 0, level)

    _rules.impl(op.name(), rule, "FuncTorchBatched", with_keyset=True)


def _map(op, n, arguments, mapped):
    """The op's outputs, `[n, ...]` each.

    Args:
        arguments: {name: value}.
        mapped: {name: tensor `[n, ...]`}, those of them that are mapped over.
    """
    if arguments.get("cu_seqlens_q") is not None or not mapped.keys() <= _FOLDED:
        calls = [op(**arguments | {k: v[i] for k, v in mapped.items()}) for i in range(n)]
        if isinstance(calls[0], tuple):
            return tuple(torch.stack(outputs) for outputs in zip(*calls))
        return torch.stack(calls)
    outputs = op(**arguments | _fold(n, arguments, mapped))
    if isinstance(outputs, tuple):
        return tuple(output.unflatten(0, (n, -1)) for output in outputs)
    return outputs.unflatten(0, (n, -1))


_FOLDED = {
    "q", "k_cache", "v_cache", "cache_seqlens", "block_table", "alibi_slopes", "k_scale", "v_scale",
}  # fmt: skip


def _fold(n, arguments, mapped):
    """What all n calls' sequences, `[n * B, ...]`, take instead of one call's, `[B, ...]`."""

    def all_of(name):
        """`[n, ...]`, whether it is mapped over or the same for all."""
        return mapped[name] if name in mapped else arguments[name].expand(n, *arguments[name].shape)

    paged = arguments.get("block_table") is not None
    heads = all_of("k_cache").shape[3]
    batch = all_of("block_table" if paged else "k_cache").shape[1]
    folded = {"q": all_of("q").flatten(0, 1)}
    if arguments.get("cache_seqlens") is not None:
        folded["cache_seqlens"] = all_of("cache_seqlens").flatten(0, 1)
    if {"k_cache", "v_cache"} & mapped.keys():
        folded |= {name: all_of(name).flatten(0, 1) for name in ("k_cache", "v_cache")}
        if paged:
            pages = all_of("k_cache").shape[1]
            first = pages * torch.arange(n, dtype=torch.int32, device=arguments["q"].device)
            table = all_of("block_table").clamp(0, max(pages - 1, 0))  # as the op does it
            folded["block_table"] = (table + first[:, None, None]).flatten(0, 1)
    elif paged:
        folded["block_table"] = all_of("block_table").flatten(0, 1)
    elif arguments["k_cache"].shape[1] > 0:
        # One cache for all stays where it is: each of its sequences is one page.
        table = torch.arange(batch, dtype=torch.int32, device=arguments["q"].device)
        folded["block_table"] = table.repeat(n)[:, None]
    else:
        folded |= {name: all_of(name).flatten(0, 1) for name in ("k_cache", "v_cache")}
    for name in ("alibi_slopes", "k_scale", "v_scale"):
        value = arguments.get(name)
        if value is None or (name not in mapped and value.dim() < 2):
            continue
        value = all_of(name)
        if value.dim() < 3 or value[0].numel() == 1:  # not of each sequence
            last = value[0].numel() if name == "alibi_slopes" else heads
            value = value.reshape(n, 1, -1).expand(n, batch, last)
        folded[name] = value.flatten(0, 1)
    return folded


_rules = torch.library.Library("leanattn", "IMPL")
_register(_ops.decode.default)
_register(_ops.decode_with_lse.default)
