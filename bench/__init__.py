"""The bench of leanattn: `python -m bench.decode` in the repository's root; README.md beside this.

It measures the leanattn that is installed. `python -m` puts the root first on the path, and there
lies leanattn's source without its compiled part, so the root goes from the path again, unless the
extension was built in place.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if not any((ROOT / "leanattn").glob("_C*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
