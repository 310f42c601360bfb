"""Makes the name known to Transformers: attention and mask together, and the places that guess by name."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils.generic import split_attention_implementation

from flash_decoding.transformers import paged
from flash_decoding.transformers.attention import attention
from flash_decoding.transformers.mask import attention_mask

NAME = "flash_decoding"

_MARK = "knows_flash_decoding"
"""Attribute of Transformers' check that has been taught our name."""


def register() -> None:
    """Register ``attn_implementation="flash_decoding"`` with Transformers; calling it again does nothing.

    Afterwards ``from_pretrained``, ``from_config`` and ``set_attn_implementation`` take the name, for
    ``forward``, ``generate`` and continuous batching. Attention and mask function are registered together:
    without the second, Transformers would make no mask at all.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
    _accept_name()
    paged.install()


def _accept_name() -> None:
    """Let Transformers take our name for what it is.

    It takes every name with "flash" in it for a package to be imported or fetched, and models with a list of
    such packages (gpt-oss) fall back to the first of it. For our name, and no other, the check that it is
    registered is all there is to do.
    """
    check = PreTrainedModel._check_and_adjust_attn_implementation
    if hasattr(check, _MARK):
        return

    @functools.wraps(check)
    def checked(self: PreTrainedModel, attn_implementation: str | None, *rest: Any, **named: Any) -> str:
        if split_attention_implementation(attn_implementation)[1] == NAME:
            return self.get_correct_attn_implementation(attn_implementation)
        return check(self, attn_implementation, *rest, **named)

    setattr(checked, _MARK, True)
    setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", checked)  # noqa: B010 - mypy forbids "="
