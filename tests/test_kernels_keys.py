"""How the kernels share keys out, asked of the function that they share them with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels need Triton; the CPU path does without")

import triton
import triton.language as tl

from flash_decoding.kernels import keys

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_N = 16


@triton.jit(do_not_specialize=["lo", "hi", "num_splits", "split_tiles"])  # type: ignore[untyped-decorator]  # triton.jit
def share_kernel(  # noqa: PLR0917 - a kernel's arguments are positional
    out_ptr: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    num_splits: tl.tensor,
    split_tiles: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803 - a compile-time constant
) -> None:
    origin, tiles, per_split, live_splits = keys.share(lo, hi, num_splits, split_tiles, BLOCK)
    tl.store(out_ptr, origin)
    tl.store(out_ptr + 1, tiles)
    tl.store(out_ptr + 2, per_split)
    tl.store(out_ptr + 3, live_splits)


def share(lo: int, hi: int, num_splits: int, split_tiles: int) -> tuple[int, list[list[int]]]:
    """First tile, and the tiles of each live split, counted from it."""
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    share_kernel[(1,)](out, lo, hi, num_splits, split_tiles, BLOCK_N)
    origin, tiles, per_split, live_splits = out.tolist()
    firsts = (split * per_split for split in range(live_splits))
    return origin, [list(range(first, min(first + per_split, tiles))) for first in firsts]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 300), st.integers(0, 9))
def test_splits_cover_every_tile_once(lo: int, hi: int, num_splits: int, split_tiles: int) -> None:
    """Whether a split's size is fixed (split_tiles > 0) or follows from their number."""
    origin, splits = share(lo, hi, num_splits, split_tiles)
    covered = [origin + tile for split in splits for tile in split]
    seen = range(lo // BLOCK_N, -(-hi // BLOCK_N)) if hi > lo else range(0)
    assert covered == list(seen)
    assert split_tiles or len(splits) <= num_splits
    assert len(splits) == 1 or all(splits), "a live split has tiles"
    if split_tiles:
        assert all(len(split) <= split_tiles for split in splits)
