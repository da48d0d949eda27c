"""Importing leanattn is enough for transformers and DTensor, and imports neither of them."""

import sys

import pytest

from leanattn.integrations.when_imported import when_imported


def test_action_after_a_later_import(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late_module", raising=False)
    seen, finders = [], list(sys.meta_path)
    when_imported("late_module", lambda: seen.append(sys.modules["late_module"].value))
    assert not seen and "late_module" not in sys.modules
    import late_module

    assert seen == [1] and sys.meta_path == finders
    assert late_module.__loader__ is late_module.__spec__.loader
    assert type(late_module.__loader__).__module__ != when_imported.__module__
    when_imported("late_module", lambda: seen.append(2))  # it is there
    assert seen == [1, 2]


def test_a_module_that_is_not_there():
    finders = list(sys.meta_path)
    when_imported("no_such_module", lambda: pytest.fail("there is nothing"))
    with pytest.raises(ModuleNotFoundError):
        import no_such_module  # noqa: F401
    assert sys.meta_path == finders


PROGRAM = """
import sys, leanattn
assert not {"transformers", "torch.distributed.tensor"} & sys.modules.keys()
import transformers
assert "transformers.modeling_utils" not in sys.modules
config = transformers.LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=16,
                                  num_hidden_layers=1, num_attention_heads=2)
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="leanattn")
print(model.config._attn_implementation)
"""


def test_a_plain_import_is_enough(run_python):
    pytest.importorskip("transformers", minversion="5.4")
    done = run_python("-c", PROGRAM)
    assert done.stdout.split() == ["leanattn"], done.stderr
