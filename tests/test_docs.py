"""README and pages: every block of Python in them runs, in order, and every path in them exists."""

import functools
import re
from pathlib import Path

import pytest
import torch

import leanattn

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ["README.md", "docs/*.md", "bench/README.md", "csrc/*/README.md", "csrc/cuda/*/README.md"]

pytestmark = pytest.mark.usefixtures("one_thread")


def run_page(page, **names):
    """Runs a page's blocks in one namespace, each as if it stood at its place in the page."""
    return run_blocks(DOCS / page, (DOCS / page).read_text(), **names)


def run_blocks(path, text, **names):
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    namespace = {"__name__": path.name, **names}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(path), "exec"), namespace)
    return namespace


def test_readme():
    """Its examples of `decode`, before those for models; on the CPU where there is no GPU."""
    path = ROOT / "README.md"
    text = path.read_text().split("### Beside")[0]
    if not torch.cuda.is_available():
        text = text.replace('device = "cuda"', 'device = "cpu"')
    namespace = run_blocks(path, text)
    assert namespace["device"] in text and namespace["out"].shape == (4, 128, 512)
    assert namespace["out"].isfinite().all() and namespace["lse"].shape == (4, 32)


def test_transformers_page(monkeypatch):
    """With a small Llama in place of the one that would be downloaded."""
    transformers = pytest.importorskip("transformers", minversion="5.4")

    def from_pretrained(name, *, dtype, attn_implementation):
        config = transformers.LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        )  # fmt: skip
        config._attn_implementation = attn_implementation
        return transformers.LlamaForCausalLM(config).eval()

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    # Inductor on a whole model takes a while, and has a test of its own.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    namespace = run_page("transformers.md", name="a model")
    assert namespace["model"].config._attn_implementation == "leanattn"
    assert namespace["tokens"].shape == (2, 25)


def test_sdpa_page(capsys):
    torch._dynamo.reset()
    run_page("sdpa.md")
    printed = capsys.readouterr().out
    assert printed.startswith("leanattn: " if torch.cuda.is_available() else "torch: ")


def test_flash_attn_page():
    found = run_page("flash_attn.md")
    assert found["route"].reason and found["out"].isfinite().all()


def test_own_model_page():
    namespace = run_page("own_model.md")
    assert namespace["lengths"].tolist() == [7, 1, 12]
    assert namespace["out"].shape == (20, 8, 64) and namespace["out"].isfinite().all()


def test_append_page():
    """The merged result is that of decoding prefix and own tokens in one cache."""
    found = run_page("append.md")
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


# A file of this repository, from the root on.
PATH = re.compile(
    r"\b(?:bench|csrc|docs|examples|leanattn|tests|tools)/[\w/.-]*\w\.(?:cpp|cu|h|md|png|py|sh|txt)\b"
)


@pytest.mark.parametrize("pattern", PAGES)
def test_paths_on_the_pages(pattern):
    """What a page links to, from the page on, and what it names elsewhere."""
    pages = list(ROOT.glob(pattern))
    assert pages
    for page in pages:
        text = page.read_text()
        links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
        assert [link for link in links if not (page.parent / link).exists()] == [], page
        assert [path for path in PATH.findall(text) if not (ROOT / path).exists()] == [], page


def test_paths_in_the_sources():
    """What comments and docstrings name."""
    sources = [ROOT / "setup.py", ROOT / "Makefile", *(ROOT / "leanattn").rglob("*.py")]
    found = {path for source in sources for path in PATH.findall(source.read_text())}
    assert found and [path for path in found if not (ROOT / path).exists()] == []
