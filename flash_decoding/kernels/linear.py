"""Linear layers for a few tokens: the weights pass by once, at the speed of memory.

    y = x W^T, with norm, bias, gate and residual on the way (:class:`~flash_decoding.projection.Projection`)

Grid (one dimension): STEP rows of the weights for each program, one weight after the other. A program walks
its rows along their columns, with all tokens at its side; the sum of squares that the norm needs is gathered
on the same walk, and applied at its end.

Weights depend on no other kernel. So a program asks for its first tiles before it waits for the kernel
before: they are on their way into the L2 cache while that one ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels import load, overlap
from flash_decoding.spec import padded

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.projection import LinearTile, Projection


@triton.jit
def weight_tile(
    w_ptr: tl.tensor,
    rows: tl.tensor,
    in_tile: tl.tensor,
    start: tl.tensor,
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(rows, BLOCK_K) of a weight, read once and not kept; what does not exist reads as 0, from nowhere."""
    cols = start + tl.arange(0, BLOCK_K)
    mask = in_tile[:, None]
    if COLS % BLOCK_K != 0:
        mask &= (cols < COLS)[None, :]
    ptrs = w_ptr + rows[:, None] * COLS + cols[None, :]
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def token_tile(
    x_ptr: tl.tensor,
    lanes: tl.tensor,
    tokens: tl.tensor,
    start: tl.tensor,
    x_stride: tl.tensor,
    COLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_K, lanes) of the input; lanes without a token and columns beyond the last read as 0."""
    cols = start + tl.arange(0, BLOCK_K)
    mask = (lanes < tokens)[None, :]
    if COLS % BLOCK_K != 0:
        mask &= (cols < COLS)[:, None]
    return tl.load(x_ptr + lanes[None, :] * x_stride + cols[:, None], mask=mask, other=0.0)


@triton.jit
def norm_tile(
    norm_ptr: tl.tensor, start: tl.tensor, offset: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """(BLOCK_K,) factors of the norm, in fp32."""
    cols = start + tl.arange(0, BLOCK_K)
    return tl.load(norm_ptr + cols, mask=cols < COLS, other=0.0).to(tl.float32) + offset


@triton.jit
def activated(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """silu, or gelu in its approximation by tanh."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    else:
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y


@triton.jit
def pick(which: tl.tensor, choices: tl.tuple) -> tl.tensor:
    """``choices[which]`` of up to three pointers, by selects: so their alignment stays known."""
    picked = choices[0]
    if len(choices) > 1:
        picked = tl.where(which == 1, choices[1], picked)
    if len(choices) > 2:
        picked = tl.where(which == 2, choices[2], picked)
    return picked


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(
    x_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    weight_ptrs: tl.tuple,
    bias_ptrs: tl.tuple,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    out_stride: tl.tensor,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS_0: tl.constexpr,
    ROWS_1: tl.constexpr,
    ROWS_2: tl.constexpr,
    COLS: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    NORM: tl.constexpr = norm_ptr is not None
    GATED: tl.constexpr = ACTIVATION != ""
    tile = tl.program_id(0)
    tiles_0: tl.constexpr = (ROWS_0 + STEP - 1) // STEP
    tiles_1: tl.constexpr = (ROWS_1 + STEP - 1) // STEP
    which = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_0 + tiles_1).to(tl.int32)
    before = tl.where(which == 0, 0, tl.where(which == 1, tiles_0, tiles_0 + tiles_1))
    height = tl.where(which == 0, ROWS_0, tl.where(which == 1, ROWS_1, ROWS_2))
    first_out = tl.where(which == 0, 0, tl.where(which == 1, ROWS_0, ROWS_0 + ROWS_1))
    lanes = tl.arange(0, BLOCK_N)
    rows = (tile - before) * STEP + lanes
    in_tile = (lanes < STEP) & (rows < height)
    rows = rows.to(tl.int64)
    w_ptr = pick(which, weight_ptrs) if not GATED else weight_ptrs[0]
    if OVERLAP and PREFETCH > 0:
        load.prefetch(w_ptr, tl.minimum(rows, height - 1) * COLS, load.lines_of(w_ptr, PREFETCH), COLS)
        if GATED:
            load.prefetch(
                weight_ptrs[1], tl.minimum(rows, height - 1) * COLS, load.lines_of(w_ptr, PREFETCH), COLS
            )
    if OVERLAP:
        overlap.wait_for_the_kernel_before()
        overlap.let_the_next_kernel_start()

    token = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, COLS, BLOCK_K, num_stages=STAGES):
        w = weight_tile(w_ptr, rows, in_tile, start, COLS, BLOCK_K)
        x = token_tile(x_ptr, token, tokens, start, x_stride, COLS, BLOCK_K)
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            x = (wide * norm_tile(norm_ptr, start, OFFSET, COLS, BLOCK_K)[:, None]).to(w.dtype)
        acc = tl.dot(w, x, acc)
        if GATED:
            w_up = weight_tile(weight_ptrs[1], rows, in_tile, start, COLS, BLOCK_K)
            acc_up = tl.dot(w_up, x, acc_up)

    if NORM:
        scale = tl.rsqrt(squares / COLS + EPS)[None, :]
        acc, acc_up = acc * scale, acc_up * scale
    if BIAS:
        acc += tl.load(pick(which, bias_ptrs) + rows, mask=in_tile, other=0.0).to(tl.float32)[:, None]
    y = acc
    if GATED:
        if BIAS:
            acc_up += tl.load(bias_ptrs[1] + rows, mask=in_tile, other=0.0).to(tl.float32)[:, None]
        y = activated(acc, ACTIVATION) * acc_up
    columns = first_out + rows[:, None]
    mask = in_tile[:, None] & (token < tokens)[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + token[None, :] * residual_stride + columns, mask=mask).to(tl.float32)
    tl.store(out_ptr + token[None, :] * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    projection: Projection,
    tile: LinearTile,
    *,
    residual: Tensor | None,
    out: Tensor,
    overlaps: bool,
) -> None:
    """Apply a projection to a few tokens.

    Args:
        x: (tokens, columns) in the dtype of the weights, fp16 or bf16; its last dimension is contiguous.
        projection: weights and what goes with them.
        tile: how to go over the weights.
        residual: (tokens, rows) to add, or None; may be ``out`` itself.
        out: (tokens, rows).
        overlaps: start while the kernel before ends; the hardware must know how.
    """
    tokens, columns = x.shape
    weights, norm = projection.weights, projection.norm
    rows_0, rows_1, rows_2 = (*projection.heights, 0, 0)[:3]
    lines = tile.prefetch // x.element_size()
    linear_kernel[(sum(triton.cdiv(height, tile.step) for height in projection.heights),)](
        x,
        None if norm is None else norm.weight,
        weights,
        projection.biases or weights,  # something to point to
        residual,
        out,
        tokens,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        EPS=0.0 if norm is None else norm.eps,
        OFFSET=0.0 if norm is None else norm.offset,
        ROWS_0=rows_0,
        ROWS_1=rows_1,
        ROWS_2=rows_2,
        COLS=columns,
        BIAS=len(projection.biases) > 0,
        ACTIVATION=projection.gated or "",
        STEP=tile.step,
        BLOCK_M=padded(tokens),
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        STAGES=tile.num_stages,
        PREFETCH=lines,
        OVERLAP=overlaps,
        num_warps=tile.num_warps,
        **overlap.launch_options(overlaps),
    )
