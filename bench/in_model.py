"""Times what a decode adds to a model, beside its peers: the first figure of leanattn.

    python -m bench.in_model --csv model.csv

In a graph of decodes alone a kernel's code stays in the instruction caches and in L2. In a model
the weights of a layer and the code of other kernels pass between two decodes, and it does not. So a
CUDA graph of layers is timed with the decode in each and without: bench/README.md has the method.
"""

import contextlib
import math
import sys
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear, rms_norm, silu

from bench.data import Inputs, truth
from bench.implementations import reason_of
from bench.runner import Bench, positive, run
from bench.shapes import MODEL_SETS
from bench.tables import print_model_tables

BASE, BASE_AFTER = "base", "base after"  # layers without a decode: first in each round, and last
MIN_LAYERS, MAX_LAYERS = 8, 24


def main(arguments=None):
    return run(InModel, arguments)


class InModel(Bench):
    name = "bench.in_model"
    description = "Times what leanattn.decode and its peers add to a layer of a model."
    default_sets = ["model"]
    all_sets = MODEL_SETS
    default_implementations = ["leanattn", "cudnn", "cudnn-folded", "flash", "flash-folded",
                               "flashinfer", "flashinfer-xqa", "fa3"]  # fmt: skip
    print_tables = staticmethod(print_model_tables)

    @staticmethod
    def add_arguments(parser):
        parser.add_argument(
            "--layers", type=positive, metavar="N",
            help=f"in a graph; default: one for each input set, {MIN_LAYERS} to {MAX_LAYERS}",
        )  # fmt: skip

    def __init__(self, options, device):
        super().__init__(options, device)
        self.size = MODEL if device.type == "cuda" else TRIAL
        elements = max(sum(map(math.prod, self.size.weights(s))) for _, s in self.shapes)
        self.weights = torch.empty(
            (options.layers or MAX_LAYERS, elements), dtype=self.dtype, device=device
        )
        for layer in self.weights:
            layer.normal_(std=self.size.hidden**-0.5)

    def measure(self, case):
        expected = truth(case)
        results, prepared = self.prepare(case, expected)
        self.time_alone(case, prepared, results)
        count = self.options.layers or max(MIN_LAYERS, min(MAX_LAYERS, len(case.sets)))
        model = Model(case, self.size, self.weights[:count])
        calls = {BASE: (contextlib.nullcontext, model.layer_with(None))}
        for name, (implementation, made) in prepared.items():
            try:
                with implementation.context():
                    out = model.first_answer(made)
            except Exception as error:  # whatever a library raises is its reason
                reason = f"cannot be called on queries of a model: {reason_of(error)}"
                self.refuse(case, name, reason, results)
                continue
            if self.is_right(case, name, out, expected, results):
                calls[name] = (implementation.context, model.layer_with(made))
        captured = self.capture(case, calls, model.layers, results)
        captured[BASE_AFTER] = captured[BASE]
        times = self.time(captured, model.layers)
        base, base_after = times.pop(BASE), times.pop(BASE_AFTER)
        for name, layer in times.items():
            results[name].update(
                layers=count, layer_us=layer.median, layer_us_quartile1=layer.quartile1,
                layer_us_quartile3=layer.quartile3, base_us=base.median,
                base_after_us=base_after.median,
            )  # fmt: skip
        return results


@dataclass(frozen=True)
class Size:
    """Of a model: its hidden size, and how many bytes of weights a layer has about, whatever heads
    it has; the feed-forward part is as wide as that takes."""

    hidden: int
    layer_bytes: int

    def weights(self, shape):
        """[out, in] of the weights of a layer: qkv, o, gate and up, down."""
        width = (shape.heads_q + 2 * shape.heads_kv) * shape.head_dim
        attention = [(width, self.hidden), (self.hidden, shape.heads_q * shape.head_dim_v)]
        left = self.layer_bytes // 2 - sum(map(math.prod, attention))
        wide = max(self.hidden // 2, left // (3 * self.hidden) // 64 * 64)
        return [*attention, (2 * wide, self.hidden), (self.hidden, wide)]


MODEL = Size(2048, 92_000_000)  # more than an L2 cache holds
TRIAL = Size(64, 200_000)  # for the CPU, to try the bench


@dataclass
class Layer:
    """Its weights, each [out, in], and the q, K and V that its decode is called with."""

    qkv: torch.Tensor
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    inputs: Inputs


class Model:
    """Layers for a case, each with weights of its own, and with caches of its own as far as there
    are input sets."""

    def __init__(self, case, size, weights):
        self.shape = case.shape
        self.layers = [
            Layer(*_views(row, size.weights(case.shape)), case.sets[i % len(case.sets)])
            for i, row in enumerate(weights)
        ]
        self.tokens = case.shape.batch * case.shape.seqlen_q
        numbers = dict(dtype=weights.dtype, device=weights.device)
        self.x = torch.ones(self.tokens, size.hidden, **numbers)  # what goes from layer to layer
        self.norm = torch.ones(size.hidden, **numbers)

    def layer_with(self, prepared):
        """A function that runs one layer: with `prepared`'s call for its decode, or, where that is
        None, without any; the next product then reads as many numbers out of what the first gave,
        which are in L2 as those of a decode would be."""
        width_v = self.shape.heads_q * self.shape.head_dim_v

        def run_layer(layer):
            qkv = linear(rms_norm(self.x, self.norm.shape, self.norm), layer.qkv)
            if prepared is None:
                out = qkv.view(-1)[: self.tokens * width_v]
            else:
                out = self._decode(prepared, layer.inputs, qkv)
            hidden = linear(out.reshape(self.tokens, width_v), layer.o)
            gate, up = linear(hidden, layer.gate_up).chunk(2, -1)
            torch.mm(silu(gate) * up, layer.down.T, out=self.x)

        return run_layer

    def first_answer(self, prepared):
        """`[B, Sq, Hq, Dv]` of the first input set, called as a layer calls it."""
        inputs, shape = self.layers[0].inputs, self.shape
        qkv = inputs.q.new_zeros(self.tokens, self.layers[0].qkv.shape[0])
        qkv[:, : shape.heads_q * shape.head_dim] = inputs.q.view(self.tokens, -1)
        out = self._decode(prepared, inputs, qkv)
        return out.reshape(*inputs.q.shape[:3], shape.head_dim_v)

    def _decode(self, prepared, inputs, qkv):
        """On the queries in `qkv`, which are not copied: who cannot read them between keys and
        values reads the input set's own instead."""
        q = qkv[:, : self.shape.heads_q * self.shape.head_dim].unflatten(
            1, (self.shape.heads_q, self.shape.head_dim)
        )
        q = q.unflatten(0, (self.shape.batch, self.shape.seqlen_q))
        if prepared.takes_strided_q or q.is_contiguous():
            inputs = replace(inputs, q=q)
        return prepared.call(inputs)


def _views(numbers, shapes):
    """Tensors of these shapes, one after another in `numbers`."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = numbers[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes)]


if __name__ == "__main__":
    sys.exit(main())
