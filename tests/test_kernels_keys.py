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
from flash_decoding.spec import FIXED_SPLITS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_N = 16


MAX_SPLITS = 512


@triton.jit(do_not_specialize=["lo", "hi", "num_splits", "split_tiles"])  # type: ignore[untyped-decorator]  # triton.jit
def share_kernel(  # noqa: PLR0917 - a kernel's arguments are positional
    out_ptr: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    num_splits: tl.tensor,
    split_tiles: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803 - a compile-time constant
    SPLITS: tl.constexpr,  # noqa: N803 - likewise
    PAGED: tl.constexpr,  # noqa: N803 - likewise
) -> None:
    origin, tiles, size, live_splits = keys.share(lo, hi, num_splits, split_tiles, BLOCK)
    tl.store(out_ptr, origin)
    tl.store(out_ptr + 1, live_splits)
    splits = tl.arange(0, SPLITS)
    first, step, count = keys.hand_of(splits, origin, tiles, size, live_splits, PAGED)
    hands = out_ptr + 2 + splits * 3
    tl.store(hands, first)
    tl.store(hands + 1, tl.zeros_like(splits) + step)
    tl.store(hands + 2, count)


def share(lo: int, hi: int, num_splits: int, split_tiles: int, *, paged: bool) -> tuple[int, list[list[int]]]:
    """First tile, and the tiles of each live split."""
    out = torch.zeros(2 + 3 * MAX_SPLITS, dtype=torch.int32, device=DEVICE)
    share_kernel[(1,)](out, lo, hi, num_splits, split_tiles, BLOCK_N, MAX_SPLITS, paged)
    origin, live_splits = out[:2].tolist()
    hands = out[2:].view(MAX_SPLITS, 3)[:live_splits].tolist()
    return origin, [[first + i * step for i in range(count)] for first, step, count in hands]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 9000), st.integers(0, 9000), st.integers(1, 300), st.integers(0, 9), st.booleans())
def test_splits_cover_every_tile_once(
    lo: int, hi: int, num_splits: int, split_tiles: int, paged: bool
) -> None:
    """Whether a split's size is fixed (split_tiles > 0) or follows from their number, which bounds it."""
    origin, splits = share(lo, hi, num_splits, split_tiles, paged=paged)
    covered = [tile for split in splits for tile in split]
    seen = range(origin, -(-hi // BLOCK_N)) if hi > lo else range(0)
    size = max(split_tiles, -(-len(seen) // FIXED_SPLITS))
    if split_tiles:
        seen = seen[: num_splits * size]
    assert origin == lo // BLOCK_N
    assert sorted(covered) == list(seen)
    assert len(splits) <= num_splits
    assert len(splits) == 1 or all(splits), "a live split has tiles"
    sizes = [len(split) for split in splits]
    if split_tiles:
        assert len(splits) <= FIXED_SPLITS
        assert set(sizes[:-1]) <= {size}
        assert sizes[-1] <= size
    else:
        assert max(sizes) - min(sizes) <= 1, "shared evenly"
