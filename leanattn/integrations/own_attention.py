"""Which of transformers' models can have leanattn's attention, and refusing the others by name.

transformers asks a model's class whether it supports "sdpa" or "flash_attention_2", but lets it
have any name that is registered. A model with attention of its own then computes something else
with masks that are not made for it, or never looks at the name.
"""

import functools
import inspect
import re
import sys

import torch
from transformers import PreTrainedModel


def check_models(name):
    """Has every model that is made or set to attention `name` asked whether it takes other."""
    correct = PreTrainedModel.get_correct_attn_implementation
    if getattr(correct, "checks", None) == name:
        return

    @functools.wraps(correct)
    def checked(self, requested_attention, *args, **options):
        if requested_attention == name:
            refuse_own_attention(type(self), name)
        return correct(self, requested_attention, *args, **options)

    checked.checks = name
    PreTrainedModel.get_correct_attn_implementation = checked


def refuse_own_attention(model, name):
    """ValueError for a class of models that does not take attention `name`."""
    reason = own_attention(model, name)
    if reason is not None:
        others = '"sdpa" or "eager"' if model._supports_sdpa else '"eager"'
        raise ValueError(
            f"leanattn: {model.__name__} {reason}: use attn_implementation={others}. Of a larger "
            f"model, name the parts that are to have it, as in "
            f'attn_implementation={{"text_config": "{name}"}}'
        )


@functools.lru_cache
def own_attention(model, name):
    """Why a class of models does not take attention `name`, in words, or None if it does."""
    if not (model._supports_sdpa or model._supports_attention_backend):
        return "does not support other attention than its own"
    table = _attention_table(model, name)
    if table is not None:
        return f"takes its attention from a table of classes, {table}"
    if _has_own_attention_alone(model):
        return "does not ask transformers' AttentionInterface for its attention"
    return None


def _attention_table(model, name):
    """The name of the table from which the model chooses a class of attention, or None."""
    for key, table in vars(sys.modules.get(model.__module__, object)).items():
        if isinstance(table, dict) and "eager" in table and name not in table:
            eager = table["eager"]
            # Of several models in one file the table is of those that begin like its classes.
            if isinstance(eager, type) and issubclass(eager, torch.nn.Module):
                owner = re.sub("(Self)?Attention.*", "", eager.__name__)
                if model.__name__.startswith(owner):
                    return key
    return None


def _has_own_attention_alone(model):
    """Whether the file of the model defines attention and never asks for another."""
    try:
        source = inspect.getsource(sys.modules[model.__module__])
    except (KeyError, OSError, TypeError):  # written at a prompt: its flags have said enough
        return False
    defines = re.search(r"^class \w*Attention\w*\(.*Module\):", source, re.MULTILINE)
    return defines is not None and "ALL_ATTENTION_FUNCTIONS" not in source
