"""Times a layer's whole step inside a model: RoPE, the append and the attention.

    python -m bench.step --shape "b8 32/8"

The layers are those of bench/in_model.py, and what is told is what a step adds to one, us:

    decode alone    what leanattn.decode adds, of keys that are there already
    one launch      append_decode
    two launches    append_decode, kept from being one launch by LEANATTN_LAUNCHES=2
    two ops         rope_append_kv and decode, which is given the lengths after the append
    cudnn           torch's rotation and index_put compiled by inductor, then SDPA by cuDNN over
                    all of the cache: it takes no lengths
    rotation alone  the same without SDPA

The lengths lie on the device and advance from replay to replay, through the cache's last tokens.
"""

import contextlib
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.implementations import environment, reason_of
from bench.in_model import BASE, BASE_AFTER, MAX_LAYERS, MIN_LAYERS, InModel, Model
from bench.runner import run

ROOM = 16  # tokens that the lengths go through, one a replay
ops = torch.ops.leanattn


class Steps:
    """A step in several ways, each a function of an input set and of q, k and v, `[B, 1, H, D]`."""

    def __init__(self, case):
        shape, device = case.shape, case.device
        self.table = case.block_table
        self.first = case.cache_seqlens - ROOM
        self.lengths = self.first.clone()
        self.attended = self.lengths + 1  # as a model works them out, once for all layers
        self.rows = torch.arange(shape.batch, device=device)
        frequencies = 10000 ** -(torch.arange(shape.head_dim // 2, device=device) * 2.0)
        angles = torch.arange(shape.capacity, device=device)[:, None] * frequencies
        self.cos, self.sin = angles.cos(), angles.sin()

    def advance(self):
        self.lengths.copy_(self.first + (self.attended - self.first) % ROOM)
        self.attended.copy_(self.lengths + 1)

    def decode_alone(self, inputs, q, k, v):
        return ops.decode(q, inputs.k_cache, inputs.v_cache, self.attended, self.table)

    def one_op(self, inputs, q, k, v):
        return ops.append_decode(
            q, k, v, inputs.k_cache, inputs.v_cache, self.lengths, self.table, cos=self.cos,
            sin=self.sin,
        )  # fmt: skip

    def two_ops(self, inputs, q, k, v):
        caches = inputs.k_cache, inputs.v_cache
        ops.rope_append_kv(q, k, v, *caches, self.lengths, self.table, self.cos, self.sin)
        return ops.decode(q, *caches, self.attended, self.table)

    def rotation_alone(self, inputs, q, k, v):
        return _rotate_and_put(
            q, k, v, inputs.k_cache, inputs.v_cache, self.rows, self.lengths, self.cos, self.sin
        )

    def cudnn(self, inputs, q, k, v):
        q = self.rotation_alone(inputs, q, k, v)
        caches = (x.transpose(1, 2) for x in (inputs.k_cache, inputs.v_cache))
        return scaled_dot_product_attention(q.transpose(1, 2), *caches, enable_gqa=True)


@torch.compile(dynamic=False)
def _rotate_and_put(q, k, v, k_cache, v_cache, rows, lengths, cos, sin):
    """q `[B, 1, Hq, D]` rotated; k rotated, and v, in the caches."""
    at = lengths.long()
    cos, sin = cos[at][:, None, None], sin[at][:, None, None]

    def rotated(x):
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)

    k_cache[rows, at] = rotated(k)[:, 0]
    v_cache[rows, at] = v[:, 0]
    return rotated(q)


class StepModel(Model):
    """The layers of bench/in_model.py, with a step of a layer in a decode's place."""

    def _decode(self, step, inputs, qkv):
        shape = self.shape
        heads = [shape.heads_q, shape.heads_kv, shape.heads_kv]
        q, k, v = qkv.view(shape.batch, 1, sum(heads), shape.head_dim).split(heads, 2)
        return step(inputs, q, k, v)


class WholeStep(InModel):
    name = "bench.step"
    description = "Times RoPE, append and attention inside a model."
    default_implementations = ["leanattn"]
    print_tables = staticmethod(lambda rows: None)

    def measure(self, case):
        shape = case.shape
        if shape.seqlen_q > 1 or min(shape.lengths) <= ROOM or shape.latent_dim:
            print(f"{shape.name}: skipped: not one token a sequence behind more than {ROOM}")
            return {}
        count = self.options.layers or max(MIN_LAYERS, min(MAX_LAYERS, len(case.sets)))
        model = StepModel(case, self.size, self.weights[:count])
        steps = Steps(case)
        torch._dynamo.reset()  # each shape is compiled for, however many there are
        self._check(steps, case)
        apart, plain = lambda: environment(LEANATTN_LAUNCHES="2"), contextlib.nullcontext
        by_cudnn = lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)  # noqa: E731
        ways = {
            "decode alone": (plain, steps.decode_alone), "one launch": (plain, steps.one_op),
            "two launches": (apart, steps.one_op), "two ops": (plain, steps.two_ops),
        }  # fmt: skip
        if not shape.page_size and shape.is_full and self.device.type == "cuda":
            ways |= {"rotation alone": (plain, steps.rotation_alone),
                     "cudnn": (by_cudnn, steps.cudnn)}  # fmt: skip

        def layer_with(step):
            run_layer = model.layer_with(step)

            def run_and_advance(layer):
                run_layer(layer)
                if layer is model.layers[-1]:
                    steps.advance()

            return run_and_advance

        calls = {BASE: (plain, layer_with(None))}
        calls |= {name: (context, layer_with(step)) for name, (context, step) in ways.items()}
        captured = self.capture(case, calls, model.layers, {})
        captured[BASE_AFTER] = captured[BASE]
        times = self.time(captured, model.layers)
        base = (times.pop(BASE).median + times.pop(BASE_AFTER).median) / 2
        print(f"{shape.name}, {count} layers of {base:.2f} us: " + ", ".join(
            f"{name} +{t.median - base:.2f} ({t.quartile1 - base:.2f} to {t.quartile3 - base:.2f})"
            for name, t in times.items()), flush=True)  # fmt: skip
        return {}

    def _check(self, steps, case):
        """One op and two give the same bits, out and caches; and what the peer does is the same but
        for rounding."""
        shape, inputs = case.shape, case.sets[0]
        q, k, v = (
            torch.randn(shape.batch, 1, heads, shape.head_dim, device=case.device).to(case.dtype)
            for heads in (shape.heads_q, shape.heads_kv, shape.heads_kv)
        )
        wanted = steps.two_ops(inputs, q.clone(), k, v)
        caches = [x.clone() for x in (inputs.k_cache, inputs.v_cache)]
        for cache in (inputs.k_cache, inputs.v_cache):
            if not shape.page_size:
                cache[steps.rows, steps.lengths.long()] = torch.nan
        out = steps.one_op(inputs, q, k, v)
        same = [torch.equal(*pair) for pair in zip((out, inputs.k_cache, inputs.v_cache),
                                                   (wanted, *caches))]  # fmt: skip
        if not all(same):
            print(f"{shape.name}: out, K, V the same bits as by two ops: {same}, out differs by "
                  f"{(out - wanted).abs().max().item()}")  # fmt: skip
        if shape.page_size or self.device.type == "cpu":
            return
        try:
            rotated = steps.rotation_alone(inputs, q, k, v)
        except Exception as error:  # whatever inductor raises
            print(f"{shape.name}: the peer's rotation fails: {reason_of(error)}")
            return
        error = (inputs.k_cache - caches[0]).abs().max().item()
        if error > 0.1 or rotated.shape != q.shape:
            print(f"{shape.name}: the peer's keys are others, by {error}")


def main(arguments=None):
    return run(WholeStep, arguments)


if __name__ == "__main__":
    sys.exit(main())
