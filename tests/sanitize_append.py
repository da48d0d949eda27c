"""Calls of append_kv, rope_append_kv and merge_states for compute-sanitizer, wrong values included.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
        python tests/sanitize_append.py

What each call must give is checked too. Run it with --tool synccheck and racecheck as well.
"""

import torch
from append_cases import BAD_LENGTHS, check, make_call
from cases import int32
from test_merge import assert_merged, states

SHAPES = [
    dict(), dict(dims=(7, 5)), dict(seqlen_new=1, dims=(128, 64)), dict(page_size=3),
    dict(page_size=4, cache_dtype=torch.float8_e4m3fn, scale="batch"), dict(heads=(48, 16)),
]  # fmt: skip


def main():
    for shape in SHAPES:
        for rope in (dict(), dict(rotary_dim=6), dict(rotary_dim=6, interleaved=True)):
            rope = rope and {**rope, "rotary_dim": shape.get("dims", (64,))[0] // 2 * 2}
            for lengths in ((5, 0, 17), *BAD_LENGTHS):
                check(make_call("cuda", torch.float16, lengths=lengths, **shape, **rope))
            ragged = {k: v for k, v in shape.items() if k != "seqlen_new"}
            for bounds in ((0, 3, 3, 7), (-4, 9, 2, 2_000_000_000)):
                call = make_call("cuda", torch.float16, new_lengths=(3, 0, 4), **ragged, **rope)
                call["cu_seqlens"] = int32(bounds, "cuda")
                if "block_table" in call:
                    call["block_table"][0] = 2147480000
                check(call)
        print("ok", shape, flush=True)
    for dim in (1, 8, 72, 576):
        assert_merged(*states("cuda", torch.bfloat16, 3, (5, 3), dim))
    print("ok merge")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
