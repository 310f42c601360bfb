"""The reduction of partial results that a caller holds: the combine kernel, with every one of them live."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

from flash_decoding.kernels.arguments import REDUCING_WARPS
from flash_decoding.kernels.combine import block_of, combine_kernel

if TYPE_CHECKING:
    from torch import Tensor


def launch(outs: Tensor, lses: Tensor, *, out: Tensor, lse: Tensor) -> None:
    """Launch on the device of the tensors.

    Args:
        outs: (splits, batch, q_len, heads_q, head_dim_v).
        lses: (splits, batch, heads_q, q_len) fp32.
        out: contiguous (batch, q_len, heads_q, head_dim_v).
        lse: contiguous (batch, heads_q, q_len) fp32.
    """
    splits, batch, q_len, heads, head_dim_v = outs.shape
    tokens = outs.flatten(1, 2)
    block = block_of(splits, head_dim_v)
    combine_kernel[(triton.cdiv(head_dim_v, block["BLOCK_COLS"]) * batch * q_len * heads,)](
        tokens,
        lses,
        out,
        lse,
        (tokens.stride(1), tokens.stride(2), tokens.stride(0)),
        None,
        None,
        None,
        -1,
        -1,
        heads,
        batch,
        q_len,
        0,
        0,
        *(*lses.stride()[1:], lses.stride(0)),
        *lse.stride(),
        splits,
        GROUP=1,
        HEAD_DIM_V=head_dim_v,
        BLOCK_M=1,
        BLOCK_N=1,
        BOUND_LEFT=False,
        BOUND_RIGHT=False,
        ALL_LIVE=True,
        BALANCED=False,
        FINISHED=False,
        OVERLAP=False,
        num_warps=REDUCING_WARPS,
        **block,
    )
