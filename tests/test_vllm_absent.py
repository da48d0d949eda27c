"""Where vLLM is not installed, its integration is not in the way."""

import importlib
import sys


def test_importing_it_imports_nothing_of_vllm(run_python):
    code = "import sys, leanattn.integrations.vllm; assert 'vllm' not in sys.modules"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_registering_without_vllm_is_a_warning(monkeypatch, caplog):
    integration = importlib.import_module("leanattn.integrations.vllm")
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    integration.register()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "it cannot be used" in record.message
