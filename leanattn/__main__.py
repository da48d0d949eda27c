"""python -m leanattn: the demo; python -m leanattn info: versions, devices, and what would run."""

import argparse
import sys

import torch

from leanattn.demo.info import device_argument


def main(arguments=None):
    """Runs the command and returns its exit code: 0 if all is well, 1 if not (argparse: 2)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "info":
        from leanattn.demo.info import info

        print(info())
        return 0
    if options.picture is not None and options.no_picture:
        parser.error("--picture and --no-picture exclude each other")
    from leanattn.demo.run import run_demo

    try:
        return run_demo(options)
    except torch.OutOfMemoryError:
        print("leanattn: not enough GPU memory: give fewer or shorter --lengths", file=sys.stderr)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"leanattn: {error}", file=sys.stderr)
    return 1


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m leanattn",
        description="Decodes a ragged batch with leanattn and with torch SDPA, prints errors and "
        "times, and shows the schedule of that batch.",
    )
    parser.add_argument(
        "command", nargs="?", choices=["demo", "info"], default="demo",
        help="demo (the default), or info: versions, devices, and what would run",
    )  # fmt: skip
    parser.add_argument(
        "--device", type=device_argument,
        help="cpu, cuda or cuda:N; default: cuda where it can be used",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=_lengths, metavar="N,N,...",
        help="tokens of each sequence; default: 12 sequences of 17 to 100000, on the CPU to 4000",
    )  # fmt: skip
    parser.add_argument(
        "--picture", metavar="PATH",
        help="where to write the schedule's picture; default: leanattn-schedule.png",
    )  # fmt: skip
    parser.add_argument("--no-picture", action="store_true", help="write no picture")
    return parser


def _lengths(text):
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or not all(1 <= n < 2**31 for n in lengths):
        raise argparse.ArgumentTypeError(f"must be numbers from 1 on, as in 17,300, got {text!r}")
    return lengths


if __name__ == "__main__":
    sys.exit(main())
