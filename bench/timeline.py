"""When the CTAs of a decode get where, in a model: the in-kernel timeline.

    LEANATTN_TIMELINE=1 pip install --no-build-isolation .     # a build for this alone
    python -m bench.timeline --set model --shape "b8 32/8"

us from the launch's first CTA on, of a call inside a model (bench/in_model.py) as servers make it:
the quartiles over the CTAs, of the median over the layers. csrc/cuda/kernel/timeline.h says what
each mark is.
"""

import os
import sys

import torch

from bench.data import truth
from bench.in_model import InModel, Model
from bench.runner import run

MARKS = ["entry", "first K", "first q", "set up", "first task", "loop end", "merged", "ticket",
         "exit"]  # fmt: skip
MAX_UNITS = 256  # csrc/core/params.h has both
REPLAYS = 12


class Timeline(InModel):
    name = "bench.timeline"
    description = "Times the steps of the kernel inside a model."
    default_implementations = ["leanattn"]
    print_tables = staticmethod(lambda rows: None)

    def measure(self, case):
        results, prepared = self.prepare(case, truth(case))
        model = Model(case, self.size, self.weights[: self.options.layers or 8])
        for name, (implementation, made) in prepared.items():
            with implementation.context():
                self._print(case, name, self._times(model, made))
        return results

    def _times(self, model, prepared):
        """[calls, MAX_UNITS, marks], ns; 0 where a CTA has not come by."""
        shape = (len(model.layers), MAX_UNITS, len(MARKS))
        memory = torch.zeros(shape, dtype=torch.int64, device=self.device)
        run_layer = model.layer_with(prepared)
        run_layer(model.layers[0])
        os.environ["LEANATTN_TIMELINE_MEMORY"] = str(memory.data_ptr())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in model.layers:
                run_layer(layer)
        os.environ["LEANATTN_TIMELINE_MEMORY"] = ""
        times = []
        for _ in range(REPLAYS):
            memory.zero_()
            graph.replay()
            times.append(memory.cpu())
        return torch.cat(times[2:])

    def _print(self, case, name, times):
        seen = times > 0
        start = torch.where(seen, times, times.max()).amin((1, 2), keepdim=True)
        us = torch.where(seen, (times - start) / 1e3, torch.nan)
        print(f"{case.shape.name}: {name}, {int(seen.any(2).any(0).sum())} CTAs")
        for mark, of_mark in zip(MARKS, us.unbind(2)):
            # The quartiles over the CTAs of each call, and their medians over the calls.
            parts = torch.tensor([0, 0.25, 0.5, 0.75, 1])
            quartiles = of_mark.float().nanquantile(parts, dim=1).nanmedian(1).values
            if not quartiles.isnan().all():
                print(f"  {mark:>10}", *(f"{q:8.2f}" for q in quartiles.tolist()))


def main(arguments=None):
    return run(Timeline, arguments)


if __name__ == "__main__":
    sys.exit(main())
