"""leanattn in transformers' models: the same tokens and logits as "eager", and by the op.

Small models with random weights. Every test that could pass without leanattn counts the op's calls.
"""

import contextlib
import copy
import importlib
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.4")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import (  # noqa: E402
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)
from transformers.cache_utils import StaticSlidingWindowLayer  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import leanattn.integrations.transformers as integration  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 2
STEPS = 64
WINDOW = 16
COMMON = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
)  # fmt: skip
HYBRID = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": LlamaConfig(**COMMON),
    "phi3": Phi3Config(**COMMON),
    "phi3-window": Phi3Config(**COMMON, sliding_window=WINDOW),
    "mistral": MistralConfig(**COMMON, sliding_window=WINDOW),
    "qwen2-hybrid": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=WINDOW,
                                layer_types=HYBRID),
    "qwen3": Qwen3Config(**COMMON),
    "gemma2": Gemma2Config(**COMMON, sliding_window=WINDOW, layer_types=HYBRID,
                           attn_logit_softcapping=0.5, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**COMMON, sliding_window=WINDOW, layer_types=HYBRID,
                               query_pre_attn_scalar=16),
    "gpt-oss": GptOssConfig(**COMMON, sliding_window=WINDOW, layer_types=HYBRID,
                            num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Fails where the host asks for a value of the device."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        return op(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """A list that grows with every call of the op by the integration."""
    made = []
    decode = torch.ops.leanattn.decode

    def counting(*args, **kwargs):
        made.append(kwargs)
        return decode(*args, **kwargs)

    monkeypatch.setattr(integration, "_decode", counting)
    return made


def make_model(family, implementation="leanattn", device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])  # the model keeps its implementation in it
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, dtype=dtype
    )
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    assert model.config._attn_implementation == implementation
    if dtype != torch.float32:  # of which other numbers may be drawn
        model.load_state_dict(make_model(family, implementation).state_dict())
    if device == "cuda" and family == "gpt-oss":
        model.set_experts_implementation("eager")  # grouped products are for bf16 only there
    return model.to(device).eval()


def make_prompts(padded, device="cpu", length=23):
    """(ids, mask), [3, length]; padded: to the left, a different number of tokens."""
    ids = torch.randint(3, 97, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        for row, pads in enumerate((0, 5, length - 2)):
            mask[row, :pads] = 0
    return (ids * mask).to(device), mask.to(device)


def generate(model, ids, mask, steps=STEPS, **options):
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        **options,
    )  # fmt: skip
    return out[:, ids.shape[1] :]


def make_cache(model, name, capacity=100):
    if name == "static":
        return StaticCache(config=model.config, max_cache_len=capacity)
    return transformers.DynamicCache(config=model.config)


@torch.no_grad()
def teacher_forced(model, ids, mask, tokens, cache, steps_run_in=contextlib.nullcontext):
    """Logits of the prompt's last token and of every step after it, [B, steps + 1, V]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    logits = [out.logits[:, -1]]
    position = positions[:, -1:]
    with steps_run_in():
        for step in range(tokens.shape[1]):
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            position = position + 1
            out = model(
                tokens[:, step : step + 1], attention_mask=mask, position_ids=position,
                past_key_values=cache,
            )  # fmt: skip
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def make_tokens(steps, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, 97, (3, steps), generator=generator).to(device)


# --- Whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_tokens_of_eager(family, padded, calls):
    """64 greedy steps with the default cache, each layer of each step by the op."""
    ids, mask = make_prompts(padded)
    expected = generate(make_model(family, "eager"), ids, mask)
    assert not calls
    actual = generate(make_model(family), ids, mask)
    assert torch.equal(actual, expected)
    assert len(calls) == (STEPS - 1) * LAYERS  # the first token comes from the prefill


@pytest.mark.parametrize("family, padded", [("llama", True), ("mistral", False), ("gpt-oss", True)])
def test_generate_with_a_static_cache(family, padded, calls):
    """The capacity is larger than what is filled, and windows roll."""
    ids, mask = make_prompts(padded)
    options = dict(cache_implementation="static", disable_compile=True)
    expected = generate(make_model(family, "eager"), ids, mask, **options)
    actual = generate(make_model(family), ids, mask, **options)
    assert torch.equal(actual, expected)
    assert len(calls) == (STEPS - 1) * LAYERS


def test_beams(calls):
    """The cache's sequences change places between steps."""
    ids, mask = make_prompts(padded=True)
    options = dict(num_beams=3, steps=10)
    expected = generate(make_model("llama", "eager"), ids, mask, **options)
    actual = generate(make_model("llama"), ids, mask, **options)
    assert torch.equal(actual, expected)
    assert len(calls) == 9 * LAYERS


def test_layers_without_attention_in_between(calls):
    """A model of convolutions and attention: the latter's steps go to the op all the same."""
    config = transformers.Lfm2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    ids, mask = make_prompts(padded=True)
    tokens = []
    for name in ("eager", "leanattn"):
        torch.manual_seed(0)
        model = transformers.Lfm2ForCausalLM(copy.deepcopy(config)).eval()
        model.set_attn_implementation(name)
        tokens.append(generate(model, ids, mask, steps=10))
    assert torch.equal(tokens[1], tokens[0])
    assert len(calls) == 9


def test_encoder_decoder(calls):
    """Cross-attention too: to padded and unpadded inputs of an encoder that goes to torch."""
    config = transformers.BartConfig(
        vocab_size=97, d_model=64, encoder_layers=1, decoder_layers=LAYERS, pad_token_id=0,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, init_std=0.2,
        decoder_ffn_dim=96, max_position_embeddings=64, forced_eos_token_id=None,
    )  # fmt: skip
    for padded in (False, True):
        ids, mask = make_prompts(padded)
        tokens = []
        for name in ("eager", "leanattn"):
            torch.manual_seed(0)
            model = transformers.BartForConditionalGeneration(copy.deepcopy(config)).eval()
            model.set_attn_implementation(name)
            tokens.append(
                model.generate(ids, attention_mask=mask if padded else None, do_sample=False,
                               num_beams=1, min_new_tokens=20, max_new_tokens=20)
            )  # fmt: skip
        assert torch.equal(tokens[1], tokens[0])
    # 20 steps of self-attention and cross-attention, for both kinds of input.
    assert len(calls) == 2 * 20 * LAYERS * 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["qwen3", "phi3-window", "gemma2", "gemma3", "gpt-oss"])
def test_teacher_forced_logits(family, cache, calls):
    """In fp32 every step's logits, past windows and beside padding; and no step waits."""
    ids, mask = make_prompts(padded=True)
    tokens = make_tokens(20)
    eager, lean = make_model(family, "eager"), make_model(family)
    expected = teacher_forced(eager, ids, mask, tokens, make_cache(eager, cache))
    actual = teacher_forced(lean, ids, mask, tokens, make_cache(lean, cache), NoWaiting)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)
    assert len(calls) == 20 * LAYERS


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_forced_logits_in_bf16(family, cache, device, calls):
    """On the GPU: no farther from eager in fp32 than twice eager in bf16 is."""
    ids, mask = make_prompts(True, device)
    tokens = make_tokens(STEPS, device)
    results = {}
    for name, dtype in (("eager", torch.float32), ("eager", torch.bfloat16),
                        ("leanattn", torch.bfloat16)):  # fmt: skip
        model = make_model(family, name, device, dtype)
        results[name, dtype] = teacher_forced(model, ids, mask, tokens, make_cache(model, cache))
    truth = results["eager", torch.float32].double()
    yardstick = (results["eager", torch.bfloat16].double() - truth).abs()
    error = (results["leanattn", torch.bfloat16].double() - truth).abs()
    assert len(calls) == STEPS * LAYERS
    assert error.mean() <= 1.5 * yardstick.mean()
    assert error.max() <= 2 * yardstick.max()


@pytest.fixture
def full_windows_may_wait(monkeypatch):
    """A static cache whose window is full makes an index of -1 on the device in each step, until
    transformers 5.23 at least: StaticSlidingWindowLayer.update waits for it, whoever attends."""
    update = StaticSlidingWindowLayer.update

    def unwatched(*args, **kwargs):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return update(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(StaticSlidingWindowLayer, "update", unwatched)


@pytest.mark.gpu
@pytest.mark.usefixtures("full_windows_may_wait")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_no_host_synchronisation_in_a_step(family, device, calls):
    """A step with a padded batch and a static cache never waits for the GPU."""
    model = make_model(family, "leanattn", device, torch.bfloat16)
    ids, mask = make_prompts(True, device)
    cache = make_cache(model, "static")
    tokens = make_tokens(2, device)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        for step in range(2):
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            position = mask.sum(1, keepdim=True) - 1
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(tokens[:, step : step + 1], attention_mask=mask, position_ids=position,
                      past_key_values=cache)  # fmt: skip
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 2 * LAYERS


def test_nothing_beyond_the_lengths_is_read(calls):
    """NaN in the unused capacity and in the padding reaches no logit."""
    model = make_model("qwen2-hybrid")
    ids, mask = make_prompts(padded=True, length=12)
    grown = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    tokens = make_tokens(1)
    logits = []
    for poison in (0.0, torch.nan):
        cache = make_cache(model, "static", 40)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            for layer in cache.layers:
                unseen = torch.nn.functional.pad(mask, (0, layer.keys.shape[2] - 12)) == 0
                for states in (layer.keys, layer.values):
                    states.masked_fill_(unseen[:, None, :, None], poison)
            logits.append(model(tokens, attention_mask=grown, past_key_values=cache).logits)
    assert logits[0].isfinite().all()
    assert torch.equal(logits[1], logits[0])
    assert len(calls) == 2 * LAYERS


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
@torch.no_grad()
def test_several_queries_a_step(family, cache, padded, calls):
    """As in assisted decoding. By the op where there is neither padding nor a window."""
    ids, mask = make_prompts(padded)
    tokens = make_tokens(5)
    grown = torch.cat((mask, torch.ones_like(tokens)), 1)
    logits = []
    for name in ("eager", "leanattn"):
        model = make_model(family, name)
        states = make_cache(model, cache)
        model(ids, attention_mask=mask if padded else None, past_key_values=states)
        out = model(tokens, attention_mask=grown if padded else None, past_key_values=states)
        logits.append(out.logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-4, atol=2e-4)
    windows = 1 if family == "gpt-oss" else 0
    assert len(calls) == (0 if padded else LAYERS - windows)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_backend_override(family, monkeypatch, calls):
    """LEANATTN_BACKEND=torch: the same tokens without one call."""
    monkeypatch.setenv("LEANATTN_BACKEND", "torch")
    ids, mask = make_prompts(padded=True)
    expected = generate(make_model(family, "eager"), ids, mask, steps=8)
    actual = generate(make_model(family), ids, mask, steps=8)
    assert torch.equal(actual, expected)
    assert not calls


@pytest.mark.parametrize("length", [8, 40])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_gradients_are_those_of_eager(family, length, calls):
    """Training goes to torch, also where the sequences are as short as a decode step."""
    ids, _ = make_prompts(False, length=length)
    gradients = []
    for name in ("eager", "leanattn"):
        model = make_model(family, name).train()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for actual, expected in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    assert not calls


def test_a_step_that_needs_gradients(calls):
    """A step outside no_grad goes to torch and can be differentiated."""
    ids, _ = make_prompts(False)
    tokens = make_tokens(1)
    gradients = []
    for name in ("eager", "leanattn"):
        model = make_model("llama", name)
        cache = make_cache(model, "dynamic")
        model(ids, past_key_values=cache)
        model(tokens, past_key_values=cache).logits.square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    assert not calls


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_prefill_in_parts(family, monkeypatch):
    """Where SDPA lacks softcap or sinks the scores of some rows at a time are written out."""
    monkeypatch.setattr(integration, "_MAX_SCORES", 3 * 4 * 23 * 5)
    ids, mask = make_prompts(padded=True)
    with torch.no_grad():
        expected = make_model(family, "eager")(ids, attention_mask=mask).logits
        actual = make_model(family)(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=2e-4, atol=2e-4)


# --- torch.compile -------------------------------------------------------------------------------


class CountingBackend:
    """Runs graphs as they are; remembers how many calls of the op stand in each."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        targets = [node.target for node in graph.graph.nodes]
        self.graphs.append(targets.count(torch.ops.leanattn.decode))
        return graph.forward


@pytest.mark.parametrize("family, padded", [("llama", False), ("llama", True), ("gpt-oss", False)])
@torch.no_grad()
def test_compile_of_a_step_with_a_static_cache(family, padded, monkeypatch):
    """One whole graph for all steps, masks included, with the op in it for every layer."""
    monkeypatch.setattr(integration, "_decode", torch.ops.leanattn.decode)
    torch._dynamo.reset()
    ids, mask = make_prompts(padded)
    tokens = make_tokens(6)
    backend = CountingBackend()
    models = make_model(family, "eager"), make_model(family)
    caches = [make_cache(model, "static") for model in models]
    for model, cache in zip(models, caches):
        model(ids, attention_mask=mask if padded else None, past_key_values=cache)
    mask = torch.nn.functional.pad(mask, (0, 100 - mask.shape[1]))
    compiled = torch.compile(models[1], fullgraph=True, backend=backend)
    for step in range(tokens.shape[1]):
        mask[:, ids.shape[1] + step] = 1
        logits = [
            model(
                tokens[:, step : step + 1], attention_mask=mask if padded else None,
                position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache,
            ).logits
            for model, cache in zip((models[0], compiled), caches)
        ]  # fmt: skip
        torch.testing.assert_close(logits[1], logits[0], rtol=2e-4, atol=2e-4)
    assert backend.graphs[0] == LAYERS
    if family == "llama":  # a sliding static layer counts its tokens on the host
        assert len(backend.graphs) == 1


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@torch.no_grad()
def test_inductor_compiles_a_step(padded, monkeypatch):
    """Generated code around the op, which writes the cache in place and reads it."""
    monkeypatch.setattr(integration, "_decode", torch.ops.leanattn.decode)
    torch._dynamo.reset()
    ids, mask = make_prompts(padded)
    tokens = make_tokens(3)
    models = make_model("llama", "eager"), make_model("llama")
    caches = [make_cache(model, "static") for model in models]
    for model, cache in zip(models, caches):
        model(ids, attention_mask=mask if padded else None, past_key_values=cache)
    mask = torch.nn.functional.pad(mask, (0, 100 - mask.shape[1]))
    compiled = torch.compile(models[1], fullgraph=True)
    for step in range(3):
        mask[:, ids.shape[1] + step] = 1
        expected, actual = (
            model(
                tokens[:, step : step + 1], attention_mask=mask if padded else None,
                position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache,
            ).logits
            for model, cache in zip((models[0], compiled), caches)
        )  # fmt: skip
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.gpu
def test_generate_compiles_a_static_cache_into_cuda_graphs(device, monkeypatch):
    """What generate does by itself with a static cache on a GPU: mode="reduce-overhead"."""
    monkeypatch.setattr(integration, "_decode", torch.ops.leanattn.decode)  # not one that counts
    torch._dynamo.reset()
    model = make_model("llama", "leanattn", device, torch.bfloat16)
    in_fp32 = make_model("llama", "eager", device)
    ids, mask = make_prompts(True, device)
    errors = []
    for disable_compile in (True, False):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
            cache_implementation="static", disable_compile=disable_compile, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        # Inductor rounds in other places than eager bf16, and where two logits are close the tokens
        # part: each run is held against fp32 on the tokens that it took itself.
        tokens = out.sequences[:, ids.shape[1] : -1]
        cache = make_cache(in_fp32, "static")
        truth = teacher_forced(in_fp32, ids, mask, tokens, cache)
        errors.append((torch.stack(out.logits, 1) - truth).abs())
    eager, compiled = errors
    assert compiled.mean() <= 1.5 * eager.mean()
    assert compiled.max() <= 2 * eager.max()


# --- Masks ---------------------------------------------------------------------------------------


def padding(kind, tokens):
    mask = torch.ones(4, tokens, dtype=torch.bool)
    if kind == "left":
        mask[1, :3], mask[2, : tokens - 1] = False, False
    elif kind == "holes":
        mask[0, 5:9], mask[1, :2], mask[3, tokens - 3 : tokens - 1] = False, False, False
    return mask


RULES = {
    "causal": (causal_mask_function, None),
    "window": (sliding_window_causal_mask_function(7), 7),
    "chunks": (chunked_causal_mask_function(8, torch.zeros(4, dtype=int)), 8),
    "overlay": (and_masks(causal_mask_function, lambda b, h, q, kv: kv % 3 != 1), None),
}


@pytest.mark.parametrize("capacity", [20, 33])
@pytest.mark.parametrize("kind", [None, "none", "left", "holes"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("q_length", [1, 3])
def test_any_mask_is_what_transformers_would_have_made(q_length, rule, kind, capacity, calls):
    """lengths and pages stand for exactly the mask that SDPA would have been given, and the step
    for SDPA's result."""
    mask_function, local_size = RULES[rule]
    past = 20 - q_length
    arguments = dict(
        batch_size=4, q_length=q_length, kv_length=capacity, q_offset=torch.tensor(past),
        mask_function=mask_function, local_size=local_size,
        attention_mask=None if kind is None else padding(kind, 20),
    )  # fmt: skip
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)
    with NoWaiting():
        mask = integration.decode_mask(**arguments)
    decoded = integration._decoded(mask)
    assert (decoded is not None) == (q_length == 1 or (rule == "causal" and kind is None))
    if decoded is None:
        assert torch.equal(mask, expected)
        return
    assert torch.equal(integration._bool_mask(decoded, q_length, capacity).expand_as(expected),
                       expected)  # fmt: skip
    query = torch.randn(4, 6, q_length, 16)
    key, value = torch.randn(2, 4, 2, capacity, 16)
    out = integration._decode_step(query, key, value, decoded, 0.3, None, None)
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, expected, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out.transpose(1, 2), sdpa, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


@torch.no_grad()
def test_lengths_may_be_passed_as_the_mask(calls):
    """A caller's own [B, 1, 1, 1] int32 reaches the op: sequences of their own lengths."""
    ids, _ = make_prompts(False)
    lengths = torch.tensor([24, 9, 4], dtype=torch.int32)[:, None, None, None]
    masks = {"sdpa": torch.arange(40) < lengths, "leanattn": lengths}
    logits = {}
    for name, mask in masks.items():
        model = make_model("llama", name)
        cache = make_cache(model, "static", 40)
        model(ids, past_key_values=cache)
        logits[name] = model(make_tokens(1), attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(logits["leanattn"], logits["sdpa"], rtol=2e-4, atol=2e-4)
    assert len(calls) == LAYERS


def test_a_window_that_cuts_nothing_is_a_prefix():
    """A sliding cache holds no more than its window. Chunks and overlays are something else."""
    for rule, light in (("window", 1), ("chunks", 2), ("overlay", 2)):
        mask = integration.decode_mask(
            batch_size=2, q_length=1, kv_length=7, q_offset=5, mask_function=RULES[rule][0],
            local_size=RULES[rule][1],
        )  # fmt: skip
        assert mask.shape == ((2, 1, 1, 1) if light == 1 else (2, 1, 2, 7))


def test_pages_of_caches_of_many_strides():
    """The cache may be a view: of longer sequences, of packed K and V, of [B, T, Hkv, D]."""
    visible = padding("holes", 12)
    mask = integration._decoded(integration._pages(visible))
    query = torch.randn(4, 4, 1, 16)
    caches = [
        torch.randn(4, 2, 30, 16)[:, :, 5:17],
        torch.randn(4, 2, 12, 32)[..., 16:],
        torch.randn(4, 12, 2, 16).transpose(1, 2),
        torch.randn(12, 4, 2, 16).permute(1, 2, 0, 3),
        torch.randn(4 * 400).as_strided((4, 2, 12, 16), (396, 192, 16, 1)),
    ]
    for cache in caches:
        out = integration._decode_step(query, cache, cache, mask, None, None, None)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, cache, cache, visible[:, None, None], enable_gqa=True
        )
        torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="mask is of 12 tokens, the cache has 11"):
        cut = caches[0][:, :, :11]
        integration._decode_step(query, cut, cut, mask, None, None, None)
    # No table of tokens is right for both as they lie: V is laid out anew.
    key, value = caches[:2]
    out = integration._decode_step(query, key, value, mask, None, None, None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, visible[:, None, None], enable_gqa=True
    )
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask & torch.ones(1, dtype=torch.bool),
        lambda mask: mask.masked_fill(torch.ones(1, dtype=torch.bool), 0),
        lambda mask: ~mask,
        lambda mask: torch.where(mask, 0.0, -1.0),
        lambda mask: torch.zeros(1).masked_fill(mask, -1.0),
        lambda mask: torch.cat((mask, torch.ones(4, 1, 2, 1, dtype=torch.bool)), -1),
        lambda mask: mask + torch.zeros(4, 1, 1, 12),
        lambda mask: (1.0 - mask) * -1e9,
        lambda mask: mask[..., :5],
    ],
)
def test_a_changed_mask_is_an_error(change):
    """A model, of whatever origin, that works with its mask fails; it computes nothing else."""
    mask = integration._pages(padding("left", 12))
    query, (key, value) = torch.randn(4, 2, 1, 16), torch.randn(2, 4, 2, 12, 16)
    module = torch.nn.Module()
    integration.attention_forward(module, query, key, value, mask)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        integration.attention_forward(module, query, key, value, change(mask))


# --- Models that do more -------------------------------------------------------------------------

SMALL = dict(
    vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0,
    bos_token_id=1, eos_token_id=None,
)  # fmt: skip
MLA = dict(
    num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    moe_intermediate_size=32, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=16, index_n_heads=2, index_head_dim=16, index_topk=6,
)  # fmt: skip
SHARED_LAYERS = dict(
    num_hidden_layers=4, num_kv_shared_layers=2, head_dim=16, global_head_dim=16, sliding_window=8,
    layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=211,
)  # fmt: skip


def small_models(name, **more):
    """The model of transformers' name, by eager and by leanattn, with the same weights."""
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    models = []
    for implementation in ("eager", "leanattn"):
        config = transformers.AutoConfig.for_model(name, **{**SMALL, **more})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation
        )
        models.append(model.eval())
    return models


def logits_alike(models, *arguments, **options):
    with torch.no_grad():
        expected, actual = (model(*arguments, **options).logits for model in models)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


def test_models_whose_masks_do_not_say_all():
    """Sparse attention that is told which keys to take beside the mask."""
    _, model = small_models("deepseek_v32", **MLA)
    with pytest.raises(NotImplementedError, match="indices"):
        model(make_tokens(30))


def from_config(config, implementation="leanattn", model_class=None):
    torch.manual_seed(0)
    model_class = model_class or transformers.AutoModelForCausalLM
    make = getattr(model_class, "from_config", None) or model_class._from_config
    return make(copy.deepcopy(config), attn_implementation=implementation).eval()


def test_models_that_take_no_other_attention():
    """transformers lets them have any that is registered, and they would misread its masks, or
    never look at the name."""
    for name, config in {
        "Bloom": transformers.BloomConfig(**SMALL, n_layer=1, n_head=4),
        "CodeGen": transformers.CodeGenConfig(vocab_size=97, n_embd=64, n_layer=1, n_head=4),
        "BlipText": transformers.BlipTextConfig(**SMALL),
    }.items():
        model_class = transformers.BlipTextModel if name == "BlipText" else None
        with pytest.raises(ValueError, match=f'{name}.* does not support .* use .*"eager"'):
            from_config(config, model_class=model_class)
        model = from_config(config, "eager", model_class)
        model.config._attn_implementation = "leanattn"  # by hand, past all of transformers' checks
        if name != "CodeGen":  # which asks nobody for a mask either, and stays what it was
            with pytest.raises(ValueError, match=f"{name}.* does not support"):
                model(make_tokens(30))


BLIP = dict(
    text_config=dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                     num_attention_heads=2, encoder_hidden_size=64, bos_token_id=1, eos_token_id=2,
                     sep_token_id=2, pad_token_id=0),
    vision_config=dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                       num_attention_heads=2, image_size=32, patch_size=16),
)  # fmt: skip


def test_text_towers_of_larger_models():
    """BLIP's is in no table of transformers. By parts it may still have leanattn elsewhere."""
    config = transformers.BlipConfig(**BLIP)
    model_class = transformers.BlipForConditionalGeneration
    with pytest.raises(ValueError, match="Blip.* does not support .*text_config"):
        from_config(config, model_class=model_class)
    parts = {"": "eager", "text_config": "leanattn", "vision_config": "eager"}
    with pytest.raises(ValueError, match="BlipText.* does not support"):
        from_config(config, parts, model_class)


def test_one_part_of_a_larger_model(calls):
    """The text by leanattn and the rest by eager, as docs/transformers.md has it."""
    vision = transformers.CLIPVisionConfig(**BLIP["vision_config"])
    config = transformers.LlavaConfig(vision_config=vision, text_config=LlamaConfig(**COMMON))
    model_class = transformers.LlavaForConditionalGeneration
    parts = {"": "eager", "vision_config": "eager", "text_config": "leanattn"}
    ids, mask = make_prompts(padded=True)
    tokens = [
        generate(from_config(config, name, model_class), ids, mask, steps=6)
        for name in ("eager", parts)
    ]
    assert torch.equal(tokens[1], tokens[0])
    assert len(calls) == 5 * LAYERS


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(transformers.PreTrainedModel):
    """As from outside transformers: its class says nothing of other attention."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.post_init()


def test_models_from_outside_transformers():
    """Their class decides, in no table of transformers though it is."""
    with pytest.raises(ValueError, match="OwnModel does not support other attention"):
        from_config(OwnConfig(**COMMON), model_class=OwnModel)

    class Willing(OwnModel):
        _supports_sdpa = True

    assert from_config(OwnConfig(**COMMON), model_class=Willing)


def test_models_that_say_yes_and_never_ask(tmp_path, monkeypatch):
    """A file that defines attention and leaves it at that, whatever the flags say."""
    (tmp_path / "modeling_deaf.py").write_text(
        "import torch.nn as nn\n"
        "from transformers import LlamaConfig, PreTrainedModel\n"
        "class DeafAttention(nn.Module):\n    pass\n"
        "class DeafModel(PreTrainedModel):\n"
        "    config_class = LlamaConfig\n    _supports_sdpa = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    deaf = importlib.import_module("modeling_deaf").DeafModel
    with pytest.raises(ValueError, match="DeafModel does not ask"):
        from_config(LlamaConfig(**COMMON), model_class=deaf)


@pytest.mark.parametrize("name, config", {
    "Falcon": dict(vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=4),
    "GPTJ": dict(vocab_size=97, n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_positions=64),
    "GPTNeo": dict(vocab_size=97, hidden_size=64, num_layers=1, num_heads=4,
                   attention_types=[[["global"], 1]]),
}.items())  # fmt: skip
def test_tables_of_attention_classes(name, config):
    """The name is none of theirs: instead of a KeyError they say so, and what to use."""
    config = getattr(transformers, f"{name}Config")(**config)
    own = "takes its attention from a table of classes|does not support other attention"
    with pytest.raises(ValueError, match=rf"{name}\w* ({own}).* use attn_implementation="):
        from_config(config)


def test_a_vision_tower_with_a_table():
    """The whole model is refused by it, and the text by itself is not."""
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                  output_channels=16, mlp_dim=32, num_pos_feats=8)  # fmt: skip
    config = transformers.SamConfig(vision_config=vision)
    with pytest.raises(ValueError, match="SamVision.*_CLASSES.*text_config"):
        from_config(config, model_class=transformers.SamModel)


def test_a_config_in_no_table_of_transformers(calls):
    """Voxtral Realtime's text model."""
    name = "VoxtralRealtimeTextConfig"
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    from transformers.models.voxtral_realtime import modeling_voxtral_realtime

    config = getattr(transformers, name)(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=16,
        max_position_embeddings=128,
    )  # fmt: skip
    x, t = torch.randn(2, 9, 64), torch.randn(2, 1, 64)
    results = []
    for implementation in ("eager", "leanattn"):
        model = from_config(
            config, implementation, modeling_voxtral_realtime.VoxtralRealtimeTextModel
        )
        with torch.no_grad():
            cache = model(inputs_embeds=x, t_cond=t, use_cache=True).past_key_values
            results.append(model(inputs_embeds=x[:, :1], t_cond=t, past_key_values=cache)[0])
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4)
    assert len(calls) == 2


@pytest.mark.parametrize("name, more", {
    "deepseek_v2": {k: v for k, v in MLA.items() if "index" not in k}
    | dict(first_k_dense_replace=1),
    "falcon_h1": dict(head_dim=16, mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16,
                      mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=16),
}.items())  # fmt: skip
def test_every_padded_step_goes_to_the_op(name, more, calls):
    """Of latent models too, whose V lies unlike K, and of hybrids."""
    models = small_models(name, **more)
    ids, mask = make_prompts(padded=True, length=12)
    tokens = [generate(model, ids, mask, steps=8) for model in models]
    assert torch.equal(tokens[1], tokens[0])
    assert len(calls) == 7 * 2


def test_models_that_change_their_mask():
    tokens = make_tokens(30)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    models = small_models("doge")
    caches = [transformers.DynamicCache(config=model.config) for model in models]
    for part in (slice(0, 29), slice(29, 30)):
        with torch.no_grad():
            expected, actual = (
                model(
                    tokens[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache
                ).logits[:, -1]
                for model, cache in zip(models, caches)
            )
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


def test_models_whose_last_layers_drop_queries():
    """Gemma 4 does where layers share keys, and the rest must see what it saw."""
    models = small_models("gemma4_text", **SHARED_LAYERS)
    logits_alike(models, make_tokens(30), logits_to_keep=4)
    with torch.no_grad():
        expected, actual = (
            model(
                make_tokens(30), logits_to_keep=1,
                past_key_values=transformers.StaticCache(config=model.config, max_cache_len=300),
            ).logits
            for model in models
        )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


def test_a_mask_of_ones_own_in_int32_is_no_encoding():
    """torch says what it thinks of it, as it does with sdpa."""
    _, model = small_models("llama")
    mask = torch.ones(2, 1, 1, 30, dtype=torch.int32)
    cache = transformers.DynamicCache(config=model.config)
    model(make_tokens(29), past_key_values=cache)
    with pytest.raises(RuntimeError, match="bool or float"):
        model(make_tokens(1), past_key_values=cache, attention_mask=mask)


def test_a_transformers_too_old(monkeypatch):
    """Its masks are asked for in another way; it is told so at the import."""

    def sdpa_mask(
        batch_size, cache_position, kv_length, kv_offset=0, mask_function=None, **options
    ):
        raise AssertionError("never called")

    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", sdpa_mask)
    monkeypatch.delitem(sys.modules, integration.__name__)
    with pytest.raises(ImportError, match=r"transformers >= 5\.4, got"):
        importlib.import_module(integration.__name__)
