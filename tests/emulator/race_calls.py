"""Calls of the emulated decode kernel for ThreadSanitizer to watch: `race_calls.py LIBRARY GROUP`.

A process of its own, with the sanitizer loaded before anything else, and without torch, whose
threads it would watch too. `GROUP` is a key of GROUPS; "forgotten" tells the sanitizer nothing of
what orders memory, so that it must find races.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from native.build import import_module

# Units, items a team takes, units a team, and a cluster. The sanitizer has room for 25 CTAs.
STREAM_K = [(1, 0, 1, 1), (5, 0, 1, 1)]
TEAMS = [(4, 1, 1, 1), (2, 2, 1, 1), (12, 1, 3, 1)]
CLUSTERS = [(8, 1, 2, 2), (12, 1, 3, 3), (16, 1, 4, 2)]
random = np.random.default_rng(1)


def normal(*shape):
    return random.standard_normal(shape).astype(np.float16)


def decode(
    module, layout, rows, dim, heads=(4, 2), seqlen_q=1, page_size=None, float8=False, latent=False,
    **options,
):  # fmt: skip
    """Two sequences of 300 and 150 tokens, or for teams both of 300."""
    lengths = None if layout[1] else np.array([300, 150], np.int32)
    caches = [normal(2, 300, heads[1], dim) for _ in range(2)]
    table = None
    if page_size:
        pages = -(-300 // page_size)
        caches = [normal(2 * pages, page_size, heads[1], dim) for _ in range(2)]
        table = random.permutation(2 * pages).astype(np.int32).reshape(2, pages)
        lengths = np.array([300, 150], np.int32)
    q, k, v = (x.view(np.uint16) for x in (normal(2, seqlen_q, heads[0], dim), *caches))
    if dim == 576:
        v = k[..., :512] if latent else v[..., :512]
    if float8:
        k, v = (x.astype(np.uint8) for x in (k, v))
    settings = dict(wgmma=False, tma=True, batch_invariant=False, window_left=-1, window_right=0)
    module.decode(
        q=q, k=k, v=v, cache_seqlens=lengths, block_table=table, cu_seqlens_q=None, rows=rows,
        num_units=layout[0], items_per_team=layout[1], team_size=layout[2], cluster_size=layout[3],
        scale=0.1, slack_tiles=1 << 20, stages=3, seed=1, **{**settings, **options},
    )  # fmt: skip


def mma(module):
    for layout in STREAM_K + TEAMS + CLUSTERS:
        decode(module, layout, 8, 64)
    for layout in (STREAM_K[1], TEAMS[0], CLUSTERS[0]):
        decode(module, layout, 8, 64, tma=False)
    decode(module, STREAM_K[1], 16, 64, heads=(20, 2), seqlen_q=2)
    decode(module, STREAM_K[1], 32, 128, heads=(20, 1))
    decode(module, STREAM_K[1], 8, 256)
    for layout in (STREAM_K[1], CLUSTERS[0]):
        decode(module, layout, 8, 64, heads=(8, 4), head_pairs=True)


def float8(module):
    for tma in (True, False):
        decode(module, STREAM_K[1], 8, 128, float8=True, bf16=True, tma=tma)
    decode(module, CLUSTERS[0], 32, 128, heads=(20, 1), float8=True, bf16=True)
    decode(module, STREAM_K[1], 8, 64, float8=True, page_size=24, batch_invariant=True)


def wgmma(module):
    for rows, dim, heads in [(64, 64, 20), (128, 64, 40), (32, 128, 20), (64, 256, 20)]:
        layouts = [STREAM_K[1], (2, 1, 1, 1), (4, 1, 2, 2), (8, 1, 4, 2)]
        for i, layout in enumerate(layouts):
            seqlen_q = 1 if rows == 32 else 3
            decode(module, layout, rows, dim, (heads, 1), seqlen_q, tma=i > 0, wgmma=True)


def tree(module):
    for layout in [STREAM_K[1], *TEAMS]:
        decode(module, layout, 8, 64, batch_invariant=True)
    decode(module, STREAM_K[1], 16, 64, heads=(20, 2), batch_invariant=True)


def wide(module):
    decode(module, STREAM_K[1], 16, 576, heads=(10, 1), seqlen_q=3, latent=True)
    decode(module, CLUSTERS[0], 16, 576, heads=(10, 1), tma=False)
    for rows, heads in [(16, 10), (32, 20), (64, 40)]:
        wgmma = dict(heads=(heads, 1), wgmma=True)
        decode(
            module, (2, 1, 1, 1), rows, 576, seqlen_q=2 if rows == 64 else 1, latent=True, **wgmma
        )
        decode(module, STREAM_K[1], rows, 576, tma=False, **wgmma)
        decode(module, (8, 1, 4, 2), rows, 576, latent=True, **wgmma)


def pages(module):
    for page_size in (1, 8, 24, 64):
        for layout in STREAM_K:
            decode(module, layout, 8, 64, page_size=page_size, tma=page_size % 8 == 0)


def forgotten(module):
    module.forget_order()
    decode(module, STREAM_K[1], 8, 64)


GROUPS = {
    "mma": mma, "float8": float8, "wgmma": wgmma, "tree": tree, "wide": wide, "pages": pages,
    "forgotten": forgotten,
}  # fmt: skip

if __name__ == "__main__":
    library, group = sys.argv[1:]
    GROUPS[group](import_module(library, "emulated_kernel"))
