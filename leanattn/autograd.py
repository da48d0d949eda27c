"""What autograd does with the ops: none has a derivative, and who asks is told what to use."""

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function

import leanattn._C  # noqa: F401  registers torch.ops.leanattn

_ops = torch.ops.leanattn


def _raise_no_derivative():
    raise RuntimeError(
        "leanattn is for inference only: it has no backward, nor another derivative. Use "
        "torch.nn.functional.scaled_dot_product_attention (SDPA) where gradients are needed."
    )


# The kernel below runs at one level of torch.func's transforms, and so do these:
# torch.autograd.Function would begin with all of them once more.
class _NoBackward(torch.autograd.function._SingleLevelFunction):
    """Passes an op's outputs on, so that a backward through them says what to use instead."""

    @staticmethod
    def forward(ctx, outputs, *inputs):
        if isinstance(outputs, tuple):
            return tuple(t.view_as(t) for t in outputs)
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx, *grads):
        _raise_no_derivative()


class _NoBackwardInPlace(torch.autograd.function._SingleLevelFunction):
    """The same for a tensor that an op has written to."""

    @staticmethod
    def forward(ctx, written, *inputs):
        ctx.mark_dirty(written)
        return written

    @staticmethod
    def backward(ctx, *grads):
        _raise_no_derivative()


def _check_writable(op, name, tensor):
    """Raises for what autograd refuses to have written to, which it would say only afterwards."""
    is_view = tensor._is_view()
    base = tensor._base if is_view else tensor
    autograd = torch._C._autograd
    if base.is_leaf and base.requires_grad:
        reason = "it is a leaf that requires grad, or a view of one"
    elif is_view and autograd._get_creation_meta(tensor) != autograd.CreationMeta.DEFAULT:
        reason = "it is a view that was made under no_grad, or with others by one function"
    else:
        return
    raise RuntimeError(
        f"{op.name()}: {name} cannot be written to while gradients are recorded: {reason}; call "
        f"this under torch.no_grad(), or give {name}.detach()"
    )


def has_tangent(*tensors):
    """Whether a forward-mode derivative is being taken with respect to one of the tensors."""
    if not _may_have_tangents():
        return False
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(unpack(t, level=0).tangent is not None for t in tensors)


def _may_have_tangents():
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    transforms = torch._C._functorch.get_interpreter_stack()
    jvp = torch._C._functorch.TransformType.Jvp
    return bool(transforms) and any(transform.key() == jvp for transform in transforms)


def _register_autograd(op):
    """A backward and a forward-mode derivative that raise, and what autograd wants to know of
    tensors that are written to."""
    # torch.library.register_autograd takes no op with keyword-only tensors. This kernel runs in
    # Python, a few microseconds a call, except under torch.inference_mode, which skips it.
    after_autograd = torch._C._after_autograd_keyset
    arguments = op._schema.arguments
    written = [
        (i, a.name) for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write
    ]

    def kernel(keyset, *args, **kwargs):
        needs_grad = torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs)
        if not (written or needs_grad or _may_have_tangents()):  # nearly every call: at once
            return op.redispatch(keyset & after_autograd, *args, **kwargs)
        if has_tangent(*(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))):
            _raise_no_derivative()
        results = [args[i] if i < len(args) else kwargs[name] for i, name in written]
        if needs_grad:
            for (_, name), result in zip(written, results):
                _check_writable(op, name, result)
        outputs = op.redispatch(keyset & after_autograd, *args, **kwargs)
        for result in results:
            torch.autograd.graph.increment_version(result)
        if needs_grad:
            inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            with enable_single_level_autograd_function():
                for result in results:
                    _NoBackwardInPlace.apply(result, *(t for t in inputs if t is not result))
                if outputs is not None:
                    return _NoBackward.apply(outputs, *inputs)
        return outputs

    _autograd_kernels.impl(op.name(), kernel, "Autograd", with_keyset=True)


_autograd_kernels = torch.library.Library("leanattn", "IMPL")
_register_autograd(_ops.decode.default)
_register_autograd(_ops.decode_with_lse.default)
_register_autograd(_ops.decode_out.default)
_register_autograd(_ops.decode_with_lse_out.default)
_register_autograd(_ops.merge_states.default)
_register_autograd(_ops.append_kv.default)
_register_autograd(_ops.rope_append_kv.default)
_register_autograd(_ops.append_decode.default)
_register_autograd(_ops.append_decode_with_lse.default)
_register_autograd(_ops.append_decode_out.default)
