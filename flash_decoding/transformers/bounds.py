"""Which slots exist for each sequence of a call: what our mask function tells our attention function.

Transformers calls a mask function once a forward and hands what it returned to every layer. It passes tensors
of four dimensions through as they are (compilable caches build masks ahead and feed them back), so the
bounds travel as one:

======================  ====================================================================================
shape                   (batch, 1, 1, 2 + words) int32
dimension 1             2 instead of 1 where the mask is bidirectional; 3 where sequences are packed
dimension 2             2 instead of 1 where the mask has a window that hides keys
``[..., 0]``            first slot that exists: left padding
``[..., 1]``            length: slots in use, counted from slot 0
``[..., 2:]``           absent, or four slots a word: a byte for each that is 1 where the slot exists
======================  ====================================================================================

Shapes say what kind of mask it is because the host has to know, and cannot read a tensor without waiting.
They are integers because not every compiler takes booleans for bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput

_HEADER = 2
_BYTES = 4
"""Bytes of a word."""


@dataclass(frozen=True, eq=False)
class Bounds:
    """Sequence ``b`` has slots ``starts[b] <= slot < lengths[b]``, of which ``key_mask`` may hide some."""

    starts: Tensor
    """(batch,) int32."""
    lengths: Tensor
    """(batch,) int32."""
    key_mask: Tensor | None = None
    """(batch, columns) bool: False where a slot does not exist. Slots beyond its width do not."""
    causal: bool = True
    windowed: bool = False
    """The mask has a window, and some query token is far enough from the first slot to notice."""
    packed: bool = False
    """A row is several sequences, each of them causal; other arguments have to say where they begin."""


def pack(bounds: Bounds) -> Tensor:
    """The tensor of the table above, newly allocated."""
    shape = (-1, 3 if bounds.packed else 1 if bounds.causal else 2, 2 if bounds.windowed else 1, -1)
    # Without words, starts and lengths lie one behind the other, so that reading them back is a view, too.
    header = torch.stack((bounds.starts, bounds.lengths)).t()
    if bounds.key_mask is None:
        return header[:, None, None].expand(shape)
    batch, columns = bounds.key_mask.shape
    words = -(-columns // _BYTES)
    whole = torch.zeros(batch, words * _BYTES, dtype=torch.uint8, device=bounds.key_mask.device)
    whole[:, :columns] = bounds.key_mask
    return torch.cat((header, whole.view(torch.int32)), dim=1)[:, None, None].expand(shape)


def is_ours(mask: object) -> bool:
    """Whether :func:`pack` made this.

    Args:
        mask: what a layer got as its attention mask.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.int32 or mask.ndim != 4:
        return False
    return mask.shape[1] <= 3 and mask.shape[2] <= 2 and mask.shape[3] >= _HEADER


def unpack(mask: Tensor, capacity: int) -> Bounds:
    """The parts of :func:`pack`'s tensor: views of it, but copies where there is a key mask.

    Args:
        mask: what a layer got as its attention mask.
        capacity: slots of the cache; columns beyond are only there to fill a word.

    Raises:
        InvalidInput: it is another tensor, a mask that somebody made by hand.
    """
    if not is_ours(mask):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        wanted = "None or a (batch, tokens) mask of padding given to the model, from which ours is made"
        raise InvalidInput("attention_mask", got, wanted)
    flat = mask[:, 0, 0]
    key_mask = None
    if mask.shape[3] > _HEADER:
        key_mask = (flat[:, _HEADER:].view(torch.uint8) != 0)[:, :capacity]
    starts, lengths = (flat[:, column].contiguous() for column in range(_HEADER))
    kind = mask.shape[1]
    return Bounds(starts, lengths, key_mask, kind != 2, mask.shape[2] == 2, kind == 3)
