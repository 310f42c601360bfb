"""The mask function that Transformers calls for us: a few numbers for each sequence, never a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function
from transformers.utils.import_utils import is_torchdynamo_compiling, is_tracing

from flash_decoding.errors import InvalidInput
from flash_decoding.transformers.bounds import Bounds, pack
from flash_decoding.transformers.patterns import MaskFunction, recognise


def attention_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    **call: Any,
) -> Tensor | None:
    """What attention has to know beyond causality and a layer's own window.

    An ordinary call looks at a mask of padding on the host, which waits for the device once; while
    ``torch.compile`` traces or a CUDA graph is captured nobody looks, and the mask travels slot by slot.

    Args:
        batch_size: sequences.
        q_length: query tokens of each.
        kv_length: slots of the keys that attention will see.
        q_offset: position of the first query token; a () integer tensor from caches of fixed size.
        kv_offset: position of slot 0, above 0 where a cache has let go of the oldest tokens.
        mask_function: the pattern, see :mod:`flash_decoding.transformers.patterns`.
        attention_mask: (batch, tokens) bool, False where a token is padding; tokens beyond it are, too.
        call: further arguments of Transformers, which help to recognise the pattern while tracing.

    Returns:
        None where every slot exists and is in use, else the tensor of
        :mod:`flash_decoding.transformers.bounds`.

    Raises:
        Unsupported: a pattern that is not known here.
        InvalidInput: a mask of another rank; more query tokens than there are slots.
    """
    device = call.get("device", "cpu") if attention_mask is None else attention_mask.device
    tracing = is_tracing(attention_mask)
    pattern = recognise(mask_function, q_length, call, compiling=is_torchdynamo_compiling())
    live = q_offset + q_length - kv_offset if pattern.causal else kv_length
    if isinstance(live, int) and live > kv_length:
        raise InvalidInput("kv_length", kv_length, f"{live} or more, the slots up to the last query token")
    starts, key_mask = None, None
    if attention_mask is not None:
        key_mask = _existing(attention_mask, batch_size, kv_length, kv_offset)
        starts, key_mask = _reduced(key_mask, live, tracing=tracing)
    windowed = pattern.window is not None and not _fits(live, kv_length, pattern.window)
    in_use = isinstance(live, int) and live == kv_length
    if starts is None and key_mask is None and in_use and not windowed and not pattern.packed:
        return None
    zeros = torch.zeros(batch_size, dtype=torch.int32, device=device)
    lengths = zeros + (live.clamp(max=kv_length).to(torch.int32) if isinstance(live, Tensor) else live)
    first = zeros if starts is None else starts
    return pack(Bounds(first, lengths, key_mask, pattern.causal, windowed, pattern.packed))


def _existing(mask: Tensor, batch: int, kv_length: int, kv_offset: int) -> Tensor:
    """(batch, kv_length) bool: which slots hold a token."""
    if mask.ndim != 2 or mask.shape[0] != batch:
        raise InvalidInput("attention_mask", tuple(mask.shape), f"({batch}, tokens), True where a token is")
    held = mask[:, kv_offset : kv_offset + kv_length].bool()
    return torch.nn.functional.pad(held, (0, kv_length - held.shape[1]))


def _reduced(key_mask: Tensor, live: int | Tensor, *, tracing: bool) -> tuple[Tensor | None, Tensor | None]:
    """First slots, and the mask itself where it says more than they do; None for what is not needed."""
    slots = torch.arange(key_mask.shape[1], device=key_mask.device)
    used = slots < live
    starts = (key_mask & used).to(torch.int32).argmax(dim=1).to(torch.int32)
    if tracing:
        return starts, key_mask
    holes = ~key_mask & used & (slots >= starts[:, None])
    has_padding, has_holes = torch.stack((starts.any(), holes.any())).tolist()
    return starts if has_padding else None, key_mask if has_holes else None


def _fits(live: int | Tensor, kv_length: int, window: int) -> bool:
    """Whether the last query token still sees slot 0, for certain."""
    return (live if isinstance(live, int) else kv_length) <= window
