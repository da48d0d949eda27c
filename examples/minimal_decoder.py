"""A decoder-only language model around leanattn, complete: RMSNorm, RoPE, grouped-query attention,
a paged KV cache, greedy sampling. On a CPU and on a GPU, eager, compiled and in a CUDA graph.

    python examples/minimal_decoder.py

Weights are random, so that what it says makes no sense; all ways of running it say the same.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

import leanattn  # noqa: F401  registers torch.ops.leanattn

ops = torch.ops.leanattn


@dataclass(frozen=True)
class Config:
    vocab_size: int = 257
    hidden: int = 128
    intermediate: int = 256
    layers: int = 2
    heads_q: int = 8
    heads_kv: int = 2
    head_dim: int = 32
    page_size: int = 16
    max_tokens: int = 256  # of a sequence
    rope_base: float = 10000.0


class PagedCache:
    """K and V of all layers in pages, and whose page is whose.

    Pages are dealt out once, `max_tokens` for every sequence; a server would deal them out as
    sequences grow and end, by writing into `block_table`. All of it lies on the device: a step
    changes `lengths` without the host knowing them.
    """

    def __init__(self, config, batch, device, dtype):
        pages_each = -(-config.max_tokens // config.page_size)
        num_pages = batch * pages_each
        shape = (config.layers, num_pages, config.page_size, config.heads_kv, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        order = torch.randperm(num_pages, device=device, dtype=torch.int32)
        self.block_table = order.view(batch, pages_each)  # [B, max_pages]
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int32)  # [B]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = (config.heads_q, config.heads_kv, config.heads_kv)
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden, sum(self.heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.heads_q * config.head_dim, config.hidden, bias=False)

    def forward(self, x, k_cache, v_cache, lengths, block_table, rope, cu_seqlens):
        """x [total, hidden], k_cache and v_cache [num_pages, page_size, Hkv, D] of this layer."""
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, 1)
        # Rotates q and k, writes k and v behind what is in the cache already, and attends to all.
        out = ops.append_decode(
            q, k, v, k_cache, v_cache, lengths, block_table, cos=rope[0], sin=rope[1],
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        return self.out(out.flatten(1))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_attention = nn.RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.norm_mlp = nn.RMSNorm(config.hidden)
        self.gate_up = nn.Linear(config.hidden, 2 * config.intermediate, bias=False)
        self.down = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x, *cache):
        x = x + self.attention(self.norm_attention(x), *cache)
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        half = config.head_dim // 2
        frequencies = config.rope_base ** -(torch.arange(half) / half)
        angles = torch.arange(config.max_tokens)[:, None] * frequencies
        # [max_tokens, D / 2], fp32 whatever the model is.
        self.rope = (angles.cos(), angles.sin())

    def to(self, device, dtype):
        self.rope = tuple(table.to(device) for table in self.rope)
        return super().to(device=device, dtype=dtype)

    def forward(self, tokens, cache, cu_seqlens=None):
        """Appends tokens to the cache's sequences and says what comes next.

        tokens: [total] int64; with cu_seqlens [B + 1] int32 where each sequence's tokens begin (a
        prefill of prompts of any lengths), without it one token a sequence (a decode step).
        Returns the next token of each sequence, [B].
        """
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(
                x, cache.k[layer], cache.v[layer], cache.lengths, cache.block_table, self.rope,
                cu_seqlens,
            )  # fmt: skip
        cache.lengths += 1 if cu_seqlens is None else cu_seqlens.diff()
        if cu_seqlens is not None:
            x = x[cu_seqlens[1:].long() - 1]
        logits = functional.linear(self.norm(x), self.embedding.weight)
        return logits.argmax(-1)


@torch.inference_mode()
def generate(model, prompts, steps, mode="eager"):
    """Greedy continuation of prompts, a list of lists of tokens: [B, steps].

    mode: "eager", "compiled" (torch.compile), or "graph" (a CUDA graph of a step).
    """
    weight = model.embedding.weight
    device, batch = weight.device, len(prompts)
    cache = PagedCache(model.config, batch, device, weight.dtype)
    ends = torch.tensor([0] + [len(prompt) for prompt in prompts]).cumsum(0)
    tokens = torch.tensor(sum(prompts, []), device=device)
    next_tokens = model(tokens, cache, ends.to(device=device, dtype=torch.int32))
    out = torch.empty(steps, batch, dtype=torch.long, device=device)

    def step():
        next_tokens.copy_(model(next_tokens, cache))

    run = step
    if mode == "compiled":
        run = torch.compile(step, fullgraph=True)
    elif mode == "graph":
        run = capture(step, next_tokens, cache)
    for i in range(steps):
        out[i] = next_tokens
        run()
    return out.T


def capture(step, next_tokens, cache):
    """step as one CUDA graph. The step that warms up is taken back: it wrote only behind the
    lengths."""
    leanattn.warmup(next_tokens.device)
    state = [(tensor, tensor.clone()) for tensor in (next_tokens, cache.lengths)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, value in state:
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = Decoder(Config()).to(device, dtype)
    prompts = [list(text.encode()) for text in ("Once upon a time", "Exact", "The cache is read")]
    for mode in ("eager", "compiled") + (("graph",) if device == "cuda" else ()):
        print(mode)
        for prompt, answer in zip(prompts, generate(model, prompts, 12, mode).tolist()):
            print(f"  {bytes(prompt).decode()} -> {answer}")


if __name__ == "__main__":
    main()
