"""Runs a build and tells how far it is. What the build itself says goes to a log, which is shown if
it fails. For the Makefile:

    python tools/show_build.py LOG COMMAND...
"""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

_COMPILED = re.compile(
    r"\[(\d+)/(\d+)\] .* -c (\S+) -o "
)  # ninja's line for a file, when it is done


class Reader(threading.Thread):
    """Writes the log, and keeps what is to be shown of it."""

    def __init__(self, lines, log):
        super().__init__(daemon=True)
        self._lines, self._log = lines, log
        self.notes = []  # of setup.py
        self.progress = "building"

    def run(self):
        with open(self._log, "w", buffering=1) as log:
            for line in self._lines:
                log.write(line)
                if match := _COMPILED.search(line):
                    done, total, source = match.groups()
                    self.progress = f"compiled {done} of {total} files: {Path(source).name}"
                elif line.lstrip().startswith("leanattn: "):
                    self.notes.append(line.strip())


def run(log, command, out):
    """The exit status of the command. On a terminal one line is rewritten every second; elsewhere
    a line comes every 10 seconds, if a file is done."""
    began = time.monotonic()
    on_terminal = out.isatty()
    clear = "\r\033[K" if on_terminal else ""

    def show(text, end="\n"):
        print(clear + text, end=end, file=out, flush=True)

    show(f"leanattn: building; the log is {log}")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    reader = Reader(process.stdout, log)
    reader.start()
    shown = reader.progress
    while reader.is_alive():
        reader.join(1 if on_terminal else 10)
        while reader.notes:
            show(reader.notes.pop(0))
        if on_terminal:
            show(f"{reader.progress} ({_minutes(began)})", end="")
        elif shown != reader.progress:
            shown = reader.progress
            show(f"{shown} ({_minutes(began)})")
    status = process.wait()
    if status != 0:
        show(Path(log).read_text() + f"leanattn: not built, after {_minutes(began)}")
    else:
        show(f"leanattn: built in {_minutes(began)}")
    return status


def _minutes(began):
    seconds = round(time.monotonic() - began)
    return f"{seconds // 60}:{seconds % 60:02} min"


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1], sys.argv[2:], sys.stdout))
    except KeyboardInterrupt:
        sys.exit("\nleanattn: not built: interrupted")
