"""The same prompts through vLLM twice: by leanattn and by vLLM's own FlashAttention.

    python examples/vllm_generate.py [MODEL] [--tokens N] [--eager]

Needs a GPU, vLLM >= 0.26 and leanattn in one environment. MODEL is a name or a folder, as for
`vllm serve`; without it a small Llama of random weights is written to a temporary folder. Tells
tokens/s of both, and how many answers are the same. In 16 bits greedy answers may part where two
logits are closer than what rounding changes.
"""

import argparse
import random
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

BACKENDS = ("CUSTOM", "FLASH_ATTN")
VOCABULARY = 1024


def write_model(folder):
    """A Llama that fits everywhere, its weights large enough for answers that are not alike."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
        initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)


def make_prompts(count=16):
    """Token ids of very different numbers, some of which begin alike."""
    draw = random.Random(0)
    prefix = [draw.randrange(3, VOCABULARY) for _ in range(100)]
    prompts = []
    for i in range(count):
        own = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 400))]
        prompts.append({"prompt_token_ids": prefix + own if i % 2 else own})
    return prompts


def generate(model, backend, prompts, tokens, eager=False):
    """(answers, each a list of token ids; seconds), the second run of the same prompts."""
    llm = LLM(
        model=model, dtype="float16", skip_tokenizer_init=True, enforce_eager=eager,
        max_model_len=2048, gpu_memory_utilization=0.4, attention_config={"backend": backend},
    )  # fmt: skip
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    llm.generate(prompts, sampling, use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    return [list(output.outputs[0].token_ids) for output in outputs], seconds


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a name or a folder")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            write_model(folder)
        prompts = make_prompts()
        answers = []
        for backend in BACKENDS:
            given = options.model or folder, backend, prompts, options.tokens, options.eager
            tokens, seconds = generate(*given)
            answers.append(tokens)
            print(f"{backend:12} {sum(map(len, tokens)) / seconds:10.1f} tokens/s")
    same = sum(ours == theirs for ours, theirs in zip(*answers))
    print(f"{same} of {len(prompts)} answers are the same")
    return answers


if __name__ == "__main__":
    main()
