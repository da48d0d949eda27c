"""One of transformers' model types: a small model of it with random weights, by "eager" and by
"leanattn", and whether both give the same.

A type is tried in the way that its configuration offers; where "eager" itself cannot be made to run
by what is known here, the type is not constructible.
"""

import copy
import dataclasses
import importlib
import inspect

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import leanattn.integrations.transformers as integration

BATCH, TOKENS, STEPS, PADS = 3, 11, 5, (0, 4, 9)
TOLERANCE = 1e-3

# In this order: a class that generates is what users have.
TASKS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM",
    "TEXT_TO_SPECTROGRAM", "MASKED_LM",
)  # fmt: skip

WIDTHS = dict.fromkeys(
    ("hidden_size", "d_model", "n_embd", "hidden_dim", "embed_dim", "dim", "embedding_size",
     "projection_dim", "encoder_hidden_size", "decoder_hidden_size", "text_hidden_size",
     "vision_hidden_size", "out_hidden_size", "output_hidden_size", "encoder_hidden_dim",
     "image_text_hidden_size", "emb_dim", "lru_width", "attention_hidden_size", "n_embed",
     "encoder_dim", "text_dim", "proj_dim", "mm_hidden_size", "hidden_size_global",
     "audio_hidden_size", "embedding_dim"), 64,
) | dict.fromkeys(
    ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner",
     "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_dim", "ffn_hidden_size",
     "intermediate_dim", "decoder_intermediate_size", "encoder_intermediate_size",
     "block_ff_dim", "moe_shared_expert_intermediate_size", "intermediate_size_mlp"), 96,
) | dict.fromkeys(
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
     "decoder_attention_heads", "attention_heads", "decoder_num_attention_heads",
     "encoder_num_attention_heads", "num_attn_heads"), 4,
) | dict.fromkeys(
    ("num_key_value_heads", "num_kv_heads", "decoder_num_key_value_heads",
     "encoder_num_key_value_heads", "num_attention_groups", "multi_query_group_num",
     "num_global_key_value_heads"), 2,
) | dict.fromkeys(
    ("head_dim", "kv_channels", "v_head_dim", "qk_nope_head_dim", "d_kv", "attention_head_dim",
     "global_head_dim", "index_head_dim", "swa_head_dim"), 16,
) | dict(
    qk_rope_head_dim=8, kv_lora_rank=16, q_lora_rank=16, index_n_heads=2, index_topk=6,
    n_routed_experts=4, num_experts=4, num_local_experts=4, moe_num_experts=4, n_group=1,
    topk_group=1, num_experts_per_tok=2, num_experts_per_token=2, moe_topk=2, moe_k=2,
    top_k_experts=2, n_shared_experts=1, num_expert_group=1,
    mamba_d_head=16, mamba_n_heads=8, mamba_d_ssm=128, mamba_d_state=8, mamba_n_groups=1,
    mamba_chunk_size=8, ssm_state_size=8, mamba_num_heads=8, mamba_head_dim=16, chunk_size=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, query_pre_attn_scalar=16, hidden_size_per_layer_input=8,
    rotary_dim=8, time_step_rank=8, encoder_hash_byte_group_vocab=100, attention_chunk_size=8,
)  # fmt: skip
LAYERS = dict.fromkeys(
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
     "num_decoder_layers", "depth", "num_encoder_layers", "decoder_num_hidden_layers",
     "encoder_num_hidden_layers", "attention_layers", "num_transformer_layers"), 2,
) | dict(first_k_dense_replace=1, num_kv_shared_layers=0)  # fmt: skip
TEXT = dict(
    vocab_size=211, vocab_size_per_layer_input=211, initializer_range=0.2, init_std=0.2,
    initializer_factor=1.0, max_position_embeddings=64, n_positions=64, n_ctx=64,
    max_target_positions=64, sliding_window=6, attention_window=6, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, decoder_start_token_id=1, sep_token_id=2, forced_eos_token_id=None,
    forced_bos_token_id=None, attn_pdrop=0.0, embd_pdrop=0.0,
)  # fmt: skip
# What the layers' number or kind follows from; left out, it is worked out anew.
LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")

# What stands for nothing by default, and is nothing that a model can be without.
NEEDED = ("num_experts_per_tok", "n_group", "topk_group", "n_routed_experts", "n_shared_experts")
# What else a type needs before it is a model.
MORE = {
    "chameleon": dict(vocabulary_map={"<image>": 5}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
                 ffn_config=dict(ffn_hidden_size=96, moe_num_experts=4, moe_top_k=2)),
    "glm5_next": dict(index_kpool=2),
    "hunyuan_v1_dense": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
    "hunyuan_v1_moe": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
}  # fmt: skip

# Some models take their head dim, or tables of positions, from what else they have.
SHRINKINGS = (
    TEXT | LAYERS | WIDTHS,
    TEXT | LAYERS | {k: v for k, v in WIDTHS.items() if k not in ("head_dim", "d_kv")},
    {k: v for k, v in (TEXT | LAYERS | WIDTHS).items() if "position" not in k},
    TEXT | LAYERS,
)
# Beyond, a model is too large to be tried: its sizes have names that are not known here.
MAX_PARAMETERS = 30_000_000


@dataclasses.dataclass
class Outcome:
    """What came of one type.

    result: "equal"; "refused", by leanattn with a message of its own; "not constructible", by
    "eager" neither; "not done" in the time; "as sdpa": not what "eager" gives, which "sdpa" does
    not give either, and leanattn gives the same as that; "error", by leanattn alone; "different",
    silently.
    """

    name: str
    result: str
    model: str = ""
    message: str = ""
    checks: tuple = ()
    calls: int = 0  # of the op


def small_config(name, sizes):
    """The configuration of a type, of `sizes` wherever it or one of its parts has such a size."""
    config_type = CONFIG_MAPPING[name]
    return config_type(**_options(config_type(), sizes) | MORE.get(name, {}))


def _options(config, sizes):
    options = {
        key: sizes[key]
        for key, value in vars(config).items()
        if key in sizes
        and (value is not None or key.endswith("token_id") or key in NEEDED)
        and not isinstance(value, (list, tuple, dict))
    }
    if "kv_lora_rank" in options:  # latent attention: no groups, the head dim is the rotated part's
        options.pop("head_dim", None)
        options.pop("num_key_value_heads", None)
        options["num_key_value_heads"] = options.get("num_attention_heads", 4)
    rope = getattr(config, "rope_parameters", None) or {}
    nested = any(isinstance(value, dict) for value in rope.values())
    if (
        rope
        and not nested
        and "mrope_section"
        in (
            *rope,
            *getattr(config, "ignore_keys_at_rope_validation", ()),
        )
    ):
        rotated = int(8 * rope.get("partial_rotary_factor", 1.0))  # pairs of a head dim of 16
        sections = rope.get("mrope_section", [16, 24, 24])
        sections = [n * rotated // sum(sections) for n in sections]
        rest = rotated - sum(sections)
        sections = [n + (i < rest) for i, n in enumerate(sections)]
        options["rope_parameters"] = {**rope, "mrope_section": sections}
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is not None:
            options[key] = {"model_type": part.model_type, **_options(part, sizes)}
    if "pad_token_id" not in options and "vocab_size" in options:
        options |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return options


def model_classes(name):
    """The classes that a type may be had as, the most likely first."""
    found = []
    config_type = CONFIG_MAPPING[name]
    if getattr(config_type(), "is_encoder_decoder", False):
        tasks = sorted(TASKS, key=lambda task: task == "CAUSAL_LM")
    else:
        tasks = TASKS
    for task in tasks:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(name)
        found += [names] if isinstance(names, str) else list(names or ())
    names = modeling_auto.MODEL_MAPPING_NAMES.get(name)
    found += [names] if isinstance(names, str) else list(names or ())
    classes = [getattr(transformers, each, None) for each in found]
    folder = config_type.__module__.rpartition(".")[0]
    file = config_type.__module__.rpartition(".")[2].replace("configuration", "modeling")
    try:
        everything = vars(importlib.import_module(f"{folder}.{file}")).values()
    except ImportError:
        everything = ()
    for each in everything:
        if isinstance(each, type) and issubclass(each, transformers.PreTrainedModel):
            if each.config_class is config_type and "PreTrainedModel" not in each.__name__:
                classes.append(each)
    return [each for each in dict.fromkeys(classes) if each is not None]


def make_model(model_class, config, implementation, weights=None):
    torch.manual_seed(0)
    config = copy.deepcopy(config)  # the model keeps its implementation in it
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        if weights is not None:
            model.load_state_dict(weights)
        else:
            for parameter in model.parameters():
                # What begins as nothing, gates and sinks for instance, would hide all behind it.
                if not parameter.isfinite().all() or parameter.numel() > 1 and (
                    parameter == parameter.flatten()[0]
                ).all():  # fmt: skip
                    keep = parameter.flatten()[:1].nan_to_num(0, 0, 0)
                    parameter.copy_(keep + 0.1 * torch.randn_like(parameter))
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = generation.forced_eos_token_id = None
        generation.pad_token_id = 0
        if generation.bos_token_id is None:
            generation.bos_token_id = 1
    return model


# --- Inputs --------------------------------------------------------------------------------------


def _first(config, *names, default=None):
    """The first of these sizes that the configuration or one of its parts has."""
    for each in (config, *(getattr(config, k, None) for k in config.sub_configs)):
        for name in names:
            if isinstance(getattr(each, name, None), (int, list, tuple)):
                return getattr(each, name)
    return default


def inputs_of(model):
    """Arguments that the model's forward may take, from the most likely on."""
    random = torch.Generator().manual_seed(1)
    arguments = inspect.signature(model.forward).parameters
    vocabulary = min(_first(model.config, "vocab_size", default=200), 200)
    ids = torch.randint(3, max(4, vocabulary), (BATCH, TOKENS), generator=random)
    mask = torch.ones_like(ids)
    for row, pads in enumerate(PADS):
        mask[row, :pads] = 0
    size = _first(model.config, "image_size", default=64)
    height, width = (size, size) if isinstance(size, int) else size
    channels = _first(model.config, "num_channels", "in_channels", default=3)
    width_of = _first(model.config, "hidden_size", "d_model", "embed_dim", default=64)
    bins = _first(
        model.config, "num_mel_bins", "input_feat_per_channel", "feature_size", default=80
    )
    frames = _first(model.config, "max_source_positions", default=50) * 2
    known = dict(
        input_ids=ids * mask,
        attention_mask=mask,
        pixel_values=torch.randn(2, channels, height, width, generator=random),
        input_values=torch.randn(2, 4000, generator=random),
        input_features=torch.randn(2, bins, min(frames, 3000), generator=random),
        hidden_states=torch.randn(2, TOKENS, width_of, generator=random),
        inputs_embeds=torch.randn(BATCH, TOKENS, width_of, generator=random),
    )
    decoder = {"decoder_input_ids": ids[:, :6]} if "decoder_input_ids" in arguments else {}
    several = {k: v[:2] for k, v in decoder.items()}
    for names, more in (
        (("input_ids", "attention_mask"), decoder), (("input_ids", "attention_mask"), {}),
        (("input_ids",), {}), (("pixel_values",), several), (("pixel_values",), {}),
        (("input_values",), several), (("input_features",), several),
        (("input_ids", "pixel_values"), {}), (("inputs_embeds", "attention_mask"), {}),
        (("inputs_embeds",), {}), (("hidden_states",), {}),
    ):  # fmt: skip
        if all(name in arguments for name in names):
            yield {name: known[name] for name in names} | more


# --- Checks --------------------------------------------------------------------------------------


def _tensors(output):
    """All floating tensors in what a model returned, but for caches, whose padding may differ."""
    if isinstance(output, transformers.Cache):
        return []
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = output.values()
    if isinstance(output, (list, tuple)) or hasattr(output, "__iter__"):
        return [tensor for each in output for tensor in _tensors(each)]
    return []


def forward(model, inputs):
    """One forward, without a cache; of padded rows only what stands for a token."""
    torch.manual_seed(2)
    options = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    tensors = _tensors(model(**inputs, **options))
    mask = inputs.get("attention_mask")
    if mask is not None:
        tensors = [t[mask.bool()] if t.shape[:2] == mask.shape else t for t in tensors]
    return tensors


def _generate(model, inputs, **options):
    torch.manual_seed(2)
    out = model.generate(
        **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, num_beams=1,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return [torch.stack(out.logits, 1)]


def _generation_inputs(inputs):
    return {name: value for name, value in inputs.items() if name != "decoder_input_ids"}


def generate_padded(model, inputs):
    return _generate(model, _generation_inputs(inputs))


def generate_unpadded(model, inputs):
    inputs = _generation_inputs(inputs)
    mask = inputs.pop("attention_mask", None)
    if mask is not None and "input_ids" in inputs:
        inputs["input_ids"] = inputs["input_ids"].masked_fill(mask == 0, 7)
    return _generate(model, inputs)


def generate_static(model, inputs):
    return _generate(
        model, _generation_inputs(inputs), cache_implementation="static", disable_compile=True
    )


def several_queries(model, inputs):
    """Four tokens behind a cache, as in assisted decoding."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if "decoder_input_ids" in inputs:
        raise NotImplementedError
    torch.manual_seed(2)
    split = TOKENS - 4
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    arguments = inspect.signature(model.forward).parameters
    place = (lambda part: {"position_ids": positions[:, part]}) if (
        "position_ids" in arguments) else (lambda part: {})  # fmt: skip
    first = model(input_ids=ids[:, :split], attention_mask=mask[:, :split], use_cache=True,
                  **place(slice(0, split)))  # fmt: skip
    # In the row of which all but two tokens are padding, two of the four are.
    out = model(input_ids=ids[:, split:], attention_mask=mask, use_cache=True,
                past_key_values=first.past_key_values, **place(slice(split, None)))  # fmt: skip
    return [out.logits[mask[:, split:].bool()]]


CHECKS = (forward, generate_padded, generate_unpadded, generate_static, several_queries)


def alike(actual, expected):
    """Whether two lists of tensors are the same but for rounding."""
    if len(actual) != len(expected):
        return False
    for one, other in zip(actual, expected):
        if one.shape != other.shape:
            return False
        scale = other[other.isfinite()].abs().max().clamp(min=1e-3) if other.numel() else 1.0
        if not torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE * float(scale),
                              equal_nan=True):  # fmt: skip
            return False
    return True


class _Counter:
    """Counts the integration's calls of the op."""

    def __enter__(self):
        self.calls, self._decode = 0, integration._decode
        integration._decode = self._count
        return self

    def _count(self, *args, **options):
        self.calls += 1
        return self._decode(*args, **options)

    def __exit__(self, *error):
        integration._decode = self._decode


def _short(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def _eager(name):
    """(class, configuration, model, inputs, {check: result}) by "eager", or the last error."""
    reason = "there is no class of models with its configuration"
    for sizes in SHRINKINGS:
        try:
            config = small_config(name, sizes)
        except Exception as error:
            reason = _short(error)
            continue
        for model_class in model_classes(name):
            try:
                with torch.device("meta"):
                    size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
            except Exception:
                size = 0  # not every model can be made without numbers
            if size > MAX_PARAMETERS:
                reason = f"{model_class.__name__} has {size} parameters, too many to be tried"
                continue
            try:
                model = make_model(model_class, config, "eager")
            except Exception as error:
                reason = _short(error)
                continue
            for inputs in inputs_of(model):
                try:
                    expected = forward(model, inputs)
                    if not expected or not all(t.isfinite().all() for t in expected):
                        reason = "its results are not finite, or there are none"
                        continue
                except Exception as error:
                    reason = _short(error)
                    continue
                return model_class, config, model, inputs
    return reason


@torch.no_grad()
def try_type(name, implementation="leanattn"):
    """The Outcome of a type; `implementation` is also what names the parts of a larger model."""
    try:
        made = _eager(name)
    except Exception as error:
        return Outcome(name, "not constructible", message=_short(error))
    if isinstance(made, str):
        return Outcome(name, "not constructible", message=made)
    model_class, config, eager, inputs = made
    outcome = Outcome(name, "equal", model=model_class.__name__)
    expected = {}
    for check in CHECKS:
        try:
            expected[check] = check(eager, inputs)
        except Exception:
            continue  # not something that this model does
    try:
        lean = make_model(model_class, config, implementation, eager.state_dict())
        with _Counter() as counter:
            actual = {check: check(lean, inputs) for check in expected}
    except (ValueError, NotImplementedError) as error:
        refused = str(error).startswith("leanattn:")
        return dataclasses.replace(
            outcome, result="refused" if refused else "error", message=_short(error)
        )
    except Exception as error:
        return dataclasses.replace(outcome, result="error", message=_short(error))
    outcome.checks = tuple(check.__name__ for check in expected)
    outcome.calls = counter.calls
    unlike = [check for check in expected if not alike(actual[check], expected[check])]
    if unlike:
        outcome.message = ", ".join(check.__name__ for check in unlike)
        outcome.result = "different"
        try:
            sdpa = make_model(model_class, config, "sdpa", eager.state_dict())
            if all(alike(actual[check], check(sdpa, inputs)) for check in unlike):
                outcome.result = "as sdpa"
        except Exception:
            pass  # there is no sdpa to compare with
    return outcome
