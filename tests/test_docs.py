"""The examples in docs/ run as they stand, and give what the text says."""

import re
from pathlib import Path

import torch

import leanattn

DOCS = Path(__file__).parent.parent / "docs"


def run_examples(name):
    """The variables that the Python blocks of a document leave behind, run one after another."""
    variables = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / name).read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), variables)
    return variables


def test_the_examples():
    """docs/append.md: the merged result is that of decoding prefix and own tokens in one cache."""
    found = run_examples("append.md")
    batch, prefix = found["B"], found["P"]
    caches = [
        torch.cat([found[f"{name}_prefix"].expand(batch, -1, -1, -1), found[f"{name}_own"]], 1)
        for name in ("k", "v")
    ]
    whole, whole_lse = leanattn.decode(
        found["q"], *caches, found["own_seqlens"] + prefix, return_lse=True
    )
    torch.testing.assert_close(found["out"], whole, rtol=2**-6, atol=2**-9)
    torch.testing.assert_close(found["lse"], whole_lse, rtol=1e-5, atol=1e-5)
