"""Linear layers of a step: our kernel for a few tokens on a GPU, PyTorch's product for all else."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from flash_decoding.plan import Hardware
from flash_decoding.plan.linear import MAX_TOKENS, choose_linear_tile
from flash_decoding.projection import Norm, Projection


def apply(projection: Projection, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Norm, product, bias, gate and residual.

    Args:
        projection: what to apply.
        x: (tokens, columns).
        residual: (tokens, rows) to add.

    Returns:
        (tokens, rows), in the dtype of x.
    """
    if why_not(x):
        return with_pytorch(projection, x, residual)
    from flash_decoding.kernels import linear

    if projection.norm is not None and x.dtype == torch.float16:
        # The kernel divides by the norm at the end of its walk; until then fp16 has no room for outliers.
        x, projection = normalised(x, projection.norm), dataclasses.replace(projection, norm=None)
    out = x.new_empty(x.shape[0], projection.rows)
    hardware = Hardware.of(x.device)
    tile = choose_linear_tile(projection.heights, hardware, gated=projection.gated is not None)
    linear.launch(x, projection, tile, residual=residual, out=out, overlaps=hardware.overlaps_launches)
    return out


def why_not(x: Tensor) -> tuple[str, ...]:
    """Reasons why the kernel would not do for this input; none if it does."""
    checks = (
        (not x.is_cuda, "the tensors are not on a GPU"),
        (x.element_size() != 2, "the matrix units take fp16 and bf16"),
        (x.shape[0] > MAX_TOKENS, f"more than {MAX_TOKENS} tokens: bound by more than reading the weights"),
    )
    return tuple(reason for fails, reason in checks if fails)


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """Root mean square normalisation along the last dimension, computed in fp32."""
    wide = x.float() if x.element_size() < 4 else x
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.eps)
    return (wide * (norm.weight.to(wide.dtype) + norm.offset)).to(x.dtype)


def with_pytorch(projection: Projection, x: Tensor, residual: Tensor | None) -> Tensor:
    """The same in PyTorch's operators, for any number of tokens, dtype and device."""
    if projection.norm is not None:
        x = normalised(x, projection.norm)
    biases = projection.biases or (None,) * len(projection.weights)
    parts = [functional.linear(x, w, b) for w, b in zip(projection.weights, biases, strict=True)]
    if projection.gated == "silu":
        y = functional.silu(parts[0]) * parts[1]
    elif projection.gated == "gelu_tanh":
        y = functional.gelu(parts[0], approximate="tanh") * parts[1]
    else:
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return y if residual is None else y + residual
