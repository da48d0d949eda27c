"""A few of the model types that sweep_model_types.py goes through: each kind of what may come."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.4")

import model_types  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS_BY_THE_OP = [
    "llama", "gemma2", "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3", "falcon_h1", "lfm2",
    "bart", "gpt2", "opt", "phi",
]  # fmt: skip
NO_STEPS = ["bert", "doge", "t5gemma2", "vit"]
REFUSED = ["bloom", "falcon", "gptj", "blip_text_model", "mamba"]


def outcome_of(name):
    if name not in model_types.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return model_types.try_type(name)


@pytest.mark.parametrize("name", STEPS_BY_THE_OP + NO_STEPS)
def test_equal(name):
    outcome = outcome_of(name)
    assert outcome.result == "equal", outcome
    if name in STEPS_BY_THE_OP:
        assert outcome.calls > 0
        assert {"generate_padded", "generate_static"} <= set(outcome.checks)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    outcome = outcome_of(name)
    assert outcome.result == "refused", outcome
    assert "use attn_implementation=" in outcome.message


def test_a_wrong_mask_is_seen(monkeypatch):
    """The comparison can fail: with one token too many."""
    integration = model_types.integration

    def with_one_more(visible):
        return pages(visible | (visible.cumsum(1) == 0).flip(1).cumsum(1).eq(1).flip(1))

    pages = integration._pages
    monkeypatch.setattr(integration, "_pages", with_one_more)
    outcome = model_types.try_type("llama")
    assert outcome.result == "different" and "generate_padded" in outcome.message


def test_alike():
    one = [torch.ones(3, 4)]
    assert model_types.alike(one, [torch.ones(3, 4) + 1e-5])
    assert not model_types.alike(one, [torch.ones(3, 4) + 1e-2])
    assert not model_types.alike(one, [torch.ones(3, 1)])
    assert not model_types.alike(one, [])
