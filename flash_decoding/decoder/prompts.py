"""Prompts as callers have them, ragged or padded, and as Transformers' processors want to see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput

INTEGERS = (torch.int64, torch.int32)


def padded(prompts: Sequence[Tensor] | Tensor, mask: Tensor | None, pad: int) -> tuple[Tensor, Tensor | None]:
    """One tensor for all prompts.

    Args:
        prompts: one for each row, (tokens,) integers; or (batch, tokens).
        mask: (batch, tokens), 0 where a tensor of prompts has padding.
        pad: token to pad with, on the left.

    Returns:
        (batch, tokens) int64, and its mask of the same shape; None for a tensor that came without one, whose
        padding is yet to be found out.

    Raises:
        InvalidInput: shapes or dtypes that do not fit, a mask beside prompts that need none.
    """
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2 or prompts.dtype not in INTEGERS:
            wanted = "a list of tensors (tokens,), or one of (batch, tokens), of integers"
            raise InvalidInput("prompts", f"{tuple(prompts.shape)} of {prompts.dtype}", wanted)
        if mask is not None and mask.shape != prompts.shape:
            raise InvalidInput("attention_mask", tuple(mask.shape), f"{tuple(prompts.shape)}, as prompts")
        if mask is None:
            return prompts.long(), None
        prompts, mask = unpadded(prompts.long(), mask), None
    if mask is not None:
        raise InvalidInput(
            "attention_mask", "a mask beside a list", "none: prompts in a list have no padding"
        )
    got = [(tuple(prompt.shape), prompt.dtype) for prompt in prompts]
    if not got or any(len(shape) != 1 or shape[0] < 1 or dtype not in INTEGERS for shape, dtype in got):
        raise InvalidInput("prompts", got, "tensors (tokens,) of integers, a token or more in each")
    width = max(prompt.shape[0] for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    real = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - prompt.shape[0] :] = prompt.cpu()
        real[row, width - prompt.shape[0] :] = 1
    return ids, real


def unpadded(ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The tokens of each row that are no padding, (tokens,) int64 on the host.

    Args:
        ids: (batch, tokens).
        mask: the same shape, 0 for padding on either side.

    Raises:
        InvalidInput: a row of padding alone, or with a hole.
    """
    ids, kept = ids.cpu(), mask.cpu() != 0
    for row, real in enumerate(kept):
        places = real.nonzero().flatten()
        if not len(places) or int(places[-1] - places[0]) + 1 != len(places):
            got = f"row {row} with {len(places)} tokens, not side by side"
            raise InvalidInput(
                "attention_mask", got, "one run of ones or more in each row, padding around it"
            )
    return [row[real] for row, real in zip(ids, kept, strict=True)]


class Ids:
    """The tokens of all rows so far, on the device, padded on the left to one column for the first new token.

    Args:
        prompts: one for each row, (tokens,) int64 on the host.
        room: new tokens of a row at most.
        pad: what stands before a prompt, and behind a row that is over.
        device: where processors compute.
    """

    def __init__(self, prompts: Sequence[Tensor], room: int, pad: int, device: torch.device) -> None:
        ids, _ = padded(prompts, None, pad)
        self._width = ids.shape[1]
        self._ids = torch.full((len(prompts), self._width + room), pad, device=device)
        self._ids[:, : self._width] = ids.to(device)

    def first(self, new: int) -> Tensor:
        """(batch, columns): all prompts, and so many new tokens.

        Args:
            new: new tokens of every row.
        """
        return self._ids[:, : self._width + new]

    def of(self, row: int, new: int) -> Tensor:
        """(1, columns): one row's prompt, and so many new tokens.

        Args:
            row: which.
            new: new tokens of it.
        """
        return self._ids[row : row + 1, : self._width + new]

    def put(self, at: int, tokens: Tensor, rows: int | slice = slice(None)) -> None:
        """Write new tokens.

        Args:
            at: the first of them counts as this new token, from 0.
            tokens: (rows, count) on the device, or (count,) for one row.
            rows: whose they are.
        """
        begin = self._width + at
        self._ids[rows, begin : begin + tokens.shape[-1]] = tokens
