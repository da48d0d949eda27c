"""Times decode beside the read floor and its peers, in CUDA graphs of nothing else.

    python -m bench.decode --set seed --csv seed.csv

bench/README.md has the method and the columns.
"""

import sys

from bench import timing
from bench.data import truth
from bench.implementations import IMPLEMENTATIONS
from bench.runner import Bench, run
from bench.shapes import MAIN_SETS
from bench.tables import print_tables


def main(arguments=None):
    return run(Alone, arguments)


class Alone(Bench):
    name = "bench.decode"
    description = "Times leanattn.decode beside the read floor and its peers."
    all_sets = MAIN_SETS
    default_implementations = [i.name for i in IMPLEMENTATIONS if i.is_default]
    print_tables = staticmethod(print_tables)

    @staticmethod
    def add_arguments(parser):
        parser.add_argument(
            "--no-lengths", action="store_true",
            help="no cache_seqlens where every sequence fills a contiguous cache",
        )  # fmt: skip
        parser.add_argument(
            "--no-steps", action="store_true", help="no second table (eager steps, plans included)"
        )

    def case(self, shape):
        return self.pool.case(shape, with_lengths=not self.options.no_lengths)

    def measure(self, case):
        results, prepared = self.prepare(case, truth(case))
        self.time_alone(case, prepared, results)
        if not self.options.no_steps:
            for name, (implementation, p) in prepared.items():
                results[name]["step_us"] = self._step(case, implementation, p)
        return results

    def _step(self, case, implementation, prepared):
        def step(inputs):
            if prepared.plan:
                prepared.plan()
            prepared.call(inputs)

        with implementation.context():
            return timing.step_microseconds(step, case.sets, self.device)


if __name__ == "__main__":
    sys.exit(main())
