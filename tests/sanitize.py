"""A small set of calls for compute-sanitizer: every kernel family, both loaders, every fixup shape.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py

Without torch's caching allocator every tensor is an allocation of its own, so that a read past its
end is one that the sanitizer sees. Run it with --tool synccheck and initcheck too.
"""

import os

import torch
from paging import paginate
from reference import reference

import leanattn

CALLS = [
    # batch, seqlen_q, heads_q, heads_kv, head_dim, head_dim_v, capacity, units, options
    dict(shape=(3, 1, 4, 2, 64, 64, 300), units=5),
    dict(shape=(2, 1, 16, 2, 128, 128, 517), units=7, options=dict(softcap=20.0)),
    dict(shape=(2, 3, 8, 1, 128, 128, 400), units=64, options=dict(window_left=100)),
    dict(shape=(1, 9, 8, 1, 72, 136, 260), units=3, options=dict(causal=False, window_right=5)),
    dict(shape=(2, 5, 12, 1, 256, 256, 200), units=4),
    dict(shape=(1, 70, 1, 1, 96, 64, 64), units=2),
    dict(shape=(2, 2, 20, 1, 128, 128, 400), units=5, options=dict(window_left=100)),
    dict(shape=(1, 1, 71, 1, 64, 64, 700), units=3),
    dict(shape=(3, 1, 4, 2, 64, 64, 300), units=5, page_size=1),
    dict(shape=(3, 2, 8, 2, 128, 128, 517), units=7, page_size=16),
    dict(shape=(2, 1, 8, 2, 72, 256, 300), units=3, page_size=24, options=dict(window_left=100)),
    dict(shape=(2, 1, 8, 2, 128, 64, 300), units=64, page_size=100),
    dict(shape=(2, 1, 16, 1, 512, 264, 300), units=5),
    dict(shape=(2, 1, 16, 1, 576, 512, 300), units=5, values_in_keys=True),
    dict(shape=(2, 2, 20, 1, 576, 512, 300), units=3, options=dict(window_left=100)),
    dict(shape=(2, 1, 40, 1, 576, 512, 300), units=3, page_size=24, values_in_keys=True),
    dict(shape=(3, 1, 8, 4, 64, 64, 300), units=5, head_pairs=True),
    dict(shape=(2, 2, 8, 2, 64, 64, 300), units=64, page_size=24, head_pairs=True),
]


def run(shape, units, page_size=None, values_in_keys=False, head_pairs=False, options=None):
    batch, seqlen_q, heads_q, heads_kv, head_dim, head_dim_v, capacity = shape
    new = dict(dtype=torch.float16, device="cuda")
    q = torch.randn(batch, seqlen_q, heads_q, head_dim, **new)
    k = torch.randn(batch, capacity, heads_kv, head_dim, **new)
    v = torch.randn(batch, capacity, heads_kv, head_dim_v, **new)
    if values_in_keys:
        v = k[..., :head_dim_v]
    # The first sequence is full, so that the last rows of the allocation are read; one is empty.
    lengths = torch.tensor([capacity - 7 * i for i in range(batch)], dtype=torch.int32)
    if batch > 2:
        lengths[1] = 0
    lengths = lengths.cuda()
    os.environ["LEANATTN_NUM_UNITS"] = str(units)
    os.environ["LEANATTN_HEAD_PAIRS"] = str(int(head_pairs))
    counters = leanattn.counters("cuda", 64)
    for loader in ("tma", "cp_async"):
        os.environ["LEANATTN_LOADER"] = loader
        # Without lengths a paged call would count the unused rest of the last page.
        for given in (None, lengths) if page_size is None else (lengths,):
            for own in (None, counters):
                case = dict(q=q, k_cache=k, v_cache=v, cache_seqlens=given, **(options or {}))
                call = case
                if page_size is not None:
                    layout = "values-in-keys" if values_in_keys else "plain"
                    call = paginate(case, page_size, layout=layout, spare_pages=0, spare_entries=0)
                out, lse = leanattn.decode(**call, counters=own, return_lse=True)
                want, want_lse = reference(**case)
                error = (out.double() - want).abs().max().item()
                assert error < 5e-3, (shape, loader, error)
                assert torch.equal(lse.isinf(), want_lse.isinf().to(lse.device))
    assert not counters.any()
    print("ok", shape, flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    for call in CALLS:
        run(**call)
