"""A Phi-3-medium-shaped model end to end: time per output token and the share of attention.

    python bench/end_to_end.py --csv out.csv           # measure what out.csv has not yet
    python bench/end_to_end.py --csv out.csv --plot out.png
    python bench/end_to_end.py --csv out.csv --tiny    # a tiny model on the CPU: does it run

Model: transformers' Phi3ForCausalLM, 40 layers, 40/10 heads, D=128, hidden 5120, intermediate
17920, bf16, random weights. The cache is filled with random numbers to the context's length instead
of running every prefill: the time of a step does not depend on what stands in it.

Each row of the CSV is one configuration:

    context         tokens of the longest sequence
    batch, lengths  uniform: all have `context` tokens; ragged: context * 1/batch, 2/batch, ..., 1
    attention       leanattn; sdpa (torch chooses the backend), sdpa-flash, sdpa-cudnn; eager
    cache           static: transformers' StaticCache, 128 tokens larger than the context; a ragged
                    batch is padded to the left, as generate wants it
                    exact: a cache of just the context and the new token, so that no mask is needed
                    and SDPA's flash and cuDNN backends can run: the best case for SDPA
                    lengths: no padding, each sequence has its own length (leanattn's, ragged only)
    mode            graph: norms, MLP and RoPE compiled by inductor, the whole step one CUDA graph
                    capture: the graph alone (--no-compile, where there is no C compiler)
                    eager: neither
    ms              time per output token of the batch: median of replays, in milliseconds
    ms_without      the same with attention left out: what else a step takes
    share           of attention, 1 - ms_without / ms
    prefill_ms      of one sequence of `context` tokens by SDPA, measured once a context
    error           why there are no figures, where there are none

Compiling all 40 layers as one takes minutes, because transformers' layers know their number and are
compiled one by one. Only what the layers have in common is compiled here; the launches in between,
which a compiled model would have too, cost nothing in the graph.

112k tokens x 8 sequences would need 188 GB of cache beside 28 GB of weights: on 139 GiB the batch
of 8 ends at 56k tokens, and 112k is measured with a batch of 4.
"""

import argparse
import csv
import gc
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, Phi3Config, Phi3ForCausalLM, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.phi3 import modeling_phi3

import leanattn
import leanattn.integrations.transformers  # noqa: F401  registers "leanattn"

COLUMNS = (
    "context", "batch", "lengths", "attention", "cache", "mode", "ms", "ms_without", "share",
    "prefill_ms", "error",
)  # fmt: skip
KEY = COLUMNS[:6]
MARGIN = 128  # tokens of a static cache beyond the context: how many steps can be timed in a row
BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
IMPLEMENTATIONS = ("leanattn", "sdpa", "sdpa-flash", "sdpa-cudnn", "eager", "none")


def no_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention left out: the query itself, of the same shape as what attention gives."""
    return query.transpose(1, 2), None


# --- Caches --------------------------------------------------------------------------------------


class ExactLayer(CacheLayerMixin):
    """context + 1 tokens, the last of which each step writes anew."""

    is_compileable = False
    is_sliding = False

    def __init__(self, keys, values, context):
        super().__init__()
        self.keys, self.values = keys[:, :, : context + 1], values[:, :, : context + 1]
        self.context = context
        self.place = torch.tensor([context], device=keys.device)
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length):
        return self.context + query_length, 0

    def get_seq_length(self):
        return self.context

    def get_max_length(self):
        return self.context + 1


class LengthsLayer(ExactLayer):
    """Sequences of their own lengths [B], without padding: each step writes behind each."""

    def __init__(self, keys, values, lengths):
        super().__init__(keys, values, keys.shape[2] - 1)
        self.lengths = lengths
        self.sequences = torch.arange(keys.shape[0], device=keys.device)

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[self.sequences, :, self.lengths] = key_states[:, :, 0]
        self.values[self.sequences, :, self.lengths] = value_states[:, :, 0]
        return self.keys, self.values


class Step:
    """One decode step of a batch: the model's inputs for one kind of cache, over one storage."""

    def __init__(self, model, context, batch, lengths, kind, storage):
        device = model.device
        self.context, self.kind = context, kind
        first = context if lengths == "uniform" else context // batch
        self.lengths = torch.linspace(first, context, batch, device=device).long()
        self.inputs = {"input_ids": torch.full((batch, 1), 7, device=device), "use_cache": True}
        self.inputs["position_ids"] = self.lengths[:, None]
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=context + MARGIN)
            for layer, (keys, values) in zip(cache.layers, storage):
                layer.keys, layer.values = keys, values
                layer.device, layer.dtype = keys.device, keys.dtype
                layer.cumulative_length = torch.tensor(context, device=device)
                layer.is_initialized = True
            if lengths == "ragged":
                tokens = torch.arange(context + MARGIN, device=device)
                self.inputs["attention_mask"] = tokens >= context - self.lengths[:, None]
        elif kind == "exact":
            cache = Cache(layers=[ExactLayer(*pair, context) for pair in storage])
        else:
            cache = Cache(layers=[LengthsLayer(*pair, self.lengths) for pair in storage])
            seen = (self.lengths + 1).int()
            self.inputs["attention_mask"] = seen[:, None, None, None]
        self.cache = self.inputs["past_key_values"] = cache

    def rewind(self):
        """A static cache has grown by a token with every step."""
        if self.kind == "static":
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.context)


# --- Measuring -----------------------------------------------------------------------------------


def make_model(device, tiny):
    shape = dict(hidden_size=5120, intermediate_size=17920, num_hidden_layers=40,
                 num_attention_heads=40, num_key_value_heads=10, vocab_size=32064)  # fmt: skip
    if tiny:
        shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                     num_attention_heads=8, num_key_value_heads=2, vocab_size=97)  # fmt: skip
    config = Phi3Config(**shape, max_position_embeddings=131072, pad_token_id=0,
                        bos_token_id=None, eos_token_id=None)  # fmt: skip
    config._attn_implementation = "sdpa"
    dtype = torch.float32 if tiny else torch.bfloat16
    # Made on the device in its dtype: 14 billion numbers on the host would take minutes.
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Phi3ForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    return model.eval()


def make_storage(model, batch, tokens):
    """K and V of every layer, [B, Hkv, tokens, D], random."""
    config = model.config
    shape = (batch, config.num_key_value_heads, tokens, model.model.layers[0].self_attn.head_dim)
    new = dict(dtype=model.dtype, device=model.device)
    return [
        tuple(torch.empty(shape, **new).normal_() for _ in range(2))
        for _ in range(config.num_hidden_layers)
    ]


def compile_common_parts():
    """Norms, MLP and RoPE, each one graph for all layers; returns what takes it back."""
    names = [(modeling_phi3.Phi3RMSNorm, "forward"), (modeling_phi3.Phi3MLP, "forward"),
             (modeling_phi3, "apply_rotary_pos_emb")]  # fmt: skip
    originals = [getattr(owner, name) for owner, name in names]
    for (owner, name), original in zip(names, originals):
        setattr(owner, name, torch.compile(original, fullgraph=True))

    def restore():
        for (owner, name), original in zip(names, originals):
            setattr(owner, name, original)

    return restore


def median_ms(run, rewind, device, repeats, replays):
    """Median over repeats of the mean of some replays in a row, which the margin has room for."""
    times = []
    for _ in range(repeats):
        rewind()
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(replays):
                run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / replays)
        else:
            start = time.perf_counter()
            for _ in range(replays):
                run()
            times.append((time.perf_counter() - start) / replays * 1e3)
    return statistics.median(times)


def time_step(model, step, attention, mode, budget_s):
    """Milliseconds of one step."""
    device = model.device
    model.set_attn_implementation("sdpa" if attention in BACKENDS else attention)
    backend = sdpa_kernel(BACKENDS[attention]) if attention in BACKENDS else nullcontext()

    def forward():
        model(**step.inputs)

    restore = compile_common_parts() if mode == "graph" else None
    try:
        with torch.inference_mode(), backend:
            step.rewind()
            run = forward
            if mode != "eager" and device.type == "cuda":
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(2):
                        forward()
                torch.cuda.current_stream().wait_stream(stream)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    forward()
                run = graph.replay
            once = median_ms(run, step.rewind, device, 3, 2)
            replays = max(1, min(20, int(budget_s * 1e3 / 5 / once)))
            return median_ms(run, step.rewind, device, 5, replays)
    finally:
        if restore is not None:
            restore()


def time_prefill(model, context):
    """Milliseconds of the prefill of one sequence; both implementations use SDPA for it."""
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 90, (1, context), device=model.device)
    times = []
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            model(ids, logits_to_keep=1, use_cache=True)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
    return min(times)


# --- What is measured ----------------------------------------------------------------------------


def configurations(options):
    """(context, batch, [(lengths, attention, cache, mode)]), small ones first."""
    for context in options.contexts:
        for batch in options.batches:
            if not options.tiny and batch == 8 and context > 57344:
                if context == 114688:
                    yield 57344, 8, list(cases(8, options, False))
                    yield context, 4, list(cases(4, options, False))
                continue
            yield context, batch, list(cases(batch, options, context == options.eager_at))


def cases(batch, options, with_eager):
    wanted = [
        ("uniform", "leanattn", "static", "graph"), ("uniform", "sdpa", "static", "graph"),
        ("uniform", "leanattn", "exact", "graph"), ("uniform", "sdpa-flash", "exact", "graph"),
        ("uniform", "sdpa-cudnn", "exact", "graph"),
    ]  # fmt: skip
    if with_eager:
        wanted += [
            ("uniform", "leanattn", "static", "eager"), ("uniform", "sdpa", "static", "eager"),
            ("uniform", "eager", "static", "eager"), ("uniform", "eager", "static", "graph"),
        ]  # fmt: skip
    if batch > 1:
        wanted += [
            ("ragged", "leanattn", "static", "graph"), ("ragged", "sdpa", "static", "graph"),
            ("ragged", "leanattn", "lengths", "graph"),
        ]  # fmt: skip
    for lengths, attention, cache, mode in wanted:
        if lengths in options.lengths and attention in options.attention:
            if mode == "graph" and options.no_compile:
                mode = "capture"
            yield lengths, attention, cache, mode


def measure(options):
    device = torch.device("cpu" if options.tiny else "cuda")
    AttentionInterface.register("none", no_attention)
    AttentionMaskInterface.register("none", lambda *args, **kwargs: None)
    done = {tuple(row[name] for name in KEY): row for row in read(options.csv)}
    prefills = {int(row["context"]): row["prefill_ms"] for row in done.values()}
    model = make_model(device, options.tiny)
    if device.type == "cuda":
        leanattn.warmup(device)
    for context, batch, todo in configurations(options):
        todo = [case for case in todo if (str(context), str(batch), *case) not in done]
        if not todo:
            continue
        if context not in prefills:
            fits = options.tiny or context <= options.longest_prefill
            prefills[context] = f"{time_prefill(model, context):.1f}" if fits else ""
        storage = make_storage(model, batch, context + MARGIN)
        without, step = {}, None
        for case in todo:
            lengths, attention, cache, mode = case
            row = dict(zip(KEY, (context, batch, *case)), prefill_ms=prefills[context])
            try:
                step = Step(model, context, batch, lengths, cache, storage)
                if (cache, mode) not in without:
                    without[cache, mode] = time_step(model, step, "none", mode, options.budget)
                step = Step(model, context, batch, lengths, cache, storage)
                ms = time_step(model, step, attention, mode, options.budget)
                share = 1 - without[cache, mode] / ms
                row.update(ms=f"{ms:.4f}", ms_without=f"{without[cache, mode]:.4f}",
                           share=f"{share:.4f}")  # fmt: skip
            except (RuntimeError, ValueError) as error:
                row["error"] = str(error).splitlines()[0][:160]
            append(options.csv, row)
            print(" ".join(str(row.get(name, "")) for name in COLUMNS), flush=True)
        del storage, step
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def read(path):
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def append(path, row):
    new = not Path(path).exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


# --- The figure ----------------------------------------------------------------------------------


def speedups(rows):
    """{(batch, lengths, cache): {context: (per token, prompt and output together)}} over the best
    SDPA that was measured with the same cache, or for leanattn's own lengths with any."""
    rows = [row for row in rows if row["mode"] != "eager" and row["ms"]]
    result = {}
    for row in rows:
        if row["attention"] != "leanattn":
            continue
        peers = [
            float(other["ms"]) for other in rows
            if other["attention"].startswith("sdpa")
            and all(other[name] == row[name] for name in ("context", "batch", "lengths", "mode"))
            and (other["cache"] == row["cache"] or row["cache"] == "lengths")
        ]  # fmt: skip
        if not peers:
            continue
        context, ms, peer = int(row["context"]), float(row["ms"]), min(peers)
        both = None
        if row["prefill_ms"] and row["lengths"] == "uniform":
            # 8 prompt tokens for each output token; every sequence's prefill by itself.
            prefill, outputs = float(row["prefill_ms"]) * int(row["batch"]), context / 8
            both = (prefill + outputs * peer) / (prefill + outputs * ms)
        name = (int(row["batch"]), row["lengths"], row["cache"])
        result.setdefault(name, {})[context] = (peer / ms, both)
    return result


def plot(options):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    titles = ("time per output token", "prompt and output, 8 : 1")
    for (batch, lengths, cache), points in sorted(speedups(read(options.csv)).items()):
        contexts = sorted(points)
        for index, axis in enumerate(axes):
            shown = [c for c in contexts if points[c][index] is not None]
            axis.plot(shown, [points[c][index] for c in shown], marker="o",
                      label=f"batch {batch}, {lengths}, {cache} cache")  # fmt: skip
    for axis, title in zip(axes, titles):
        axis.set_xscale("log", base=2)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_title(title)
        axis.set_xlabel("context, tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("speed-up over the best SDPA with that cache")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(options.plot, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", required=True, help="results; what it has is not measured again")
    parser.add_argument("--plot", help="draw the CSV's speed-ups to this file, measure nothing")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768, 114688])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", nargs="+", default=["uniform", "ragged"])
    parser.add_argument("--attention", nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--eager-at", type=int, default=8192, help="context of the uncompiled runs")
    parser.add_argument("--longest-prefill", type=int, default=114688)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing a figure")
    parser.add_argument("--no-compile", action="store_true", help="CUDA graphs without inductor")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args()
    if options.tiny:
        options.contexts, options.batches, options.eager_at = [64, 128], [1, 3], 64
        options.budget = 0.05
    if options.plot:
        plot(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
