"""Every model type that transformers has, by "eager" and by "leanattn": are the results the same?

    python tests/sweep_model_types.py                        all of them, an hour of one core
    python tests/sweep_model_types.py llama bart             these
    python tests/sweep_model_types.py --resume found.jsonl   go on where the file ends

Each type has a process and a time limit of its own. Prints one line a type and the counts at the
end; model_types.py says what is compared. Exits with 1 where a type is silently different or fails
by leanattn alone.
"""

import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import resource
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # configurations name files that are none of our business

import torch
import transformers
from model_types import CONFIG_MAPPING, Outcome, try_type

FAULTS = ("different", "error", "not done")
MEMORY = 4 << 30


def run_one(name, seconds):
    """The Outcome of a type, found in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, seconds, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv() if receiver.poll(20 * seconds) else None
    except EOFError:
        found = None
    process.kill()
    process.join()
    reason = f"not within {seconds} s and {MEMORY >> 30} GiB"
    return found or Outcome(name, "not done", message=reason)


def _work(name, seconds, sender):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # models warn of much
    os.dup2(null, 1)
    sender.send(try_type(name))


def counts(outcomes):
    number = collections.Counter(outcome.result for outcome in outcomes)
    by_op = sum(outcome.result == "equal" and outcome.calls > 0 for outcome in outcomes)
    return ", ".join(f"{n} {result}" for result, n in number.most_common()) + (
        f"; of the equal ones {by_op} have steps by the op"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="model types; by default all of them")
    parser.add_argument("--seconds", type=int, default=30, help="a type's limit of CPU time")
    parser.add_argument("--resume", type=Path, help="a file of outcomes, read and continued")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for name in ("llama", "bart", "vit"):
        try_type(name)  # what all types import, so that not each process imports it anew
    outcomes = []
    if options.resume and options.resume.exists():
        lines = options.resume.read_text().splitlines()
        outcomes = [Outcome(**json.loads(line)) for line in lines]
    done = {outcome.name for outcome in outcomes}
    for name in options.types or CONFIG_MAPPING:
        if name in done:
            continue
        outcome = run_one(name, options.seconds)
        outcomes.append(outcome)
        print(f"{outcome.result:18} {name:32} {outcome.model:40} {outcome.message}", flush=True)
        if options.resume:
            with options.resume.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
    print(f"transformers {transformers.__version__}: {len(outcomes)} types: {counts(outcomes)}")
    sys.exit(any(outcome.result in FAULTS for outcome in outcomes))


if __name__ == "__main__":
    main()
