"""examples/: they run, and what they compute is right."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 12
PROMPTS = [[5, 9, 200, 13, 77], list(range(3, 40)), [42]]


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLES / "minimal_decoder.py"))


def make_model(example, device, dtype):
    torch.manual_seed(0)
    model = example["Decoder"](example["Config"]())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.to(device, dtype)


def rotate(x, model):
    """[n, H, D] at positions 0 to n, the halves of a head being the pairs."""
    cos, sin = (table[: x.shape[0], None].to(x.dtype) for table in model.rope)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@torch.inference_mode()
def logits_without_cache(model, tokens):
    """[n, V] of one sequence, all at once, with torch alone."""
    x = model.embedding(tokens)
    for block in model.blocks:
        attention = block.attention
        qkv = attention.qkv(block.norm_attention(x)).unflatten(-1, (-1, attention.head_dim))
        q, k, v = qkv.split(attention.heads, 1)
        q, k, v = (y.transpose(0, 1)[None] for y in (rotate(q, model), rotate(k, model), v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + attention.out(out[0].transpose(0, 1).flatten(1))
        gate, up = block.gate_up(block.norm_mlp(x)).chunk(2, -1)
        x = x + block.down(functional.silu(gate) * up)
    return functional.linear(model.norm(x), model.embedding.weight)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_decoder_in_fp32(mode, example):
    """Every token that it generates is the best one by a model without cache."""
    torch._dynamo.reset()
    model = make_model(example, "cpu", torch.float32)
    answers = example["generate"](model, PROMPTS, STEPS, mode)
    for prompt, answer in zip(PROMPTS, answers):
        tokens = torch.tensor(prompt + answer.tolist())
        expected = logits_without_cache(model, tokens)[len(prompt) - 1 : -1].argmax(-1)
        assert torch.equal(answer, expected)
    assert len(set(answers[0].tolist())) > 3  # a model that says one thing proves nothing


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compiled", "graph"])
def test_decoder_in_bf16(mode, example, device):
    """On the GPU no token is worse than the best by more than bf16 rounds."""
    torch._dynamo.reset()
    model = make_model(example, device, torch.bfloat16)
    answers = example["generate"](model, PROMPTS, STEPS, mode)
    if mode == "graph":  # the same kernels: the same bits
        assert torch.equal(answers, example["generate"](model, PROMPTS, STEPS))
    wide = make_model(example, device, torch.float32)
    for prompt, answer in zip(PROMPTS, answers):
        tokens = torch.tensor(prompt + answer.tolist(), device=device)
        logits = logits_without_cache(wide, tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, answer[:, None]).squeeze(1)
        assert (logits.amax(1) - chosen).max() < 0.05 * logits.std()


def test_main_runs(example, capsys, monkeypatch):
    """As from the command line."""
    monkeypatch.setattr(sys, "argv", ["minimal_decoder.py"])
    torch._dynamo.reset()
    example["main"]()
    out = capsys.readouterr().out
    parts = out.split("compiled\n")
    assert "Once upon a time -> [" in parts[0]
    if not torch.cuda.is_available():  # fp32: the same tokens; bf16 may round otherwise
        assert parts[0].removeprefix("eager\n") == parts[1]
