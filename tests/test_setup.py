"""setup.py says in one sentence what an environment lacks to build in."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_setuptools_too_old(tmp_path):
    """Python 3.10's and 3.11's own environments have 65, which fails at pyproject.toml's license
    with a page about schemas."""
    (tmp_path / "setuptools.py").write_text('__version__ = "65.5.0"')
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "leanattn: building needs setuptools >= 77 in this environment, which has 65.5.0: run "
        "`pip install --upgrade setuptools wheel ninja`"
    )


def test_the_oldest_setuptools_is_the_same_everywhere():
    """pyproject.toml's, which pip asks for, and setup.py's, for builds without isolation."""
    oldest = [
        line.split("=")[1].strip()
        for line in (ROOT / "setup.py").read_text().splitlines()
        if line.startswith("MIN_SETUPTOOLS")
    ]
    assert f'"setuptools>={oldest[0]}"' in (ROOT / "pyproject.toml").read_text()
    assert f"`setuptools` >= {oldest[0]}" in (ROOT / "README.md").read_text()
