"""Makes the name known to Transformers: attention and mask together, and the places that guess by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flash_decoding.transformers import paged
from flash_decoding.transformers.attention import attention
from flash_decoding.transformers.hooks import teach
from flash_decoding.transformers.mask import attention_mask

NAME = "flash_decoding"

OURS = (NAME, f"paged|{NAME}")
"""Our name, and what continuous batching makes of it where it has names of its own."""


def register() -> None:
    """Register ``attn_implementation="flash_decoding"`` with Transformers; calling it again does nothing.

    Afterwards ``from_pretrained``, ``from_config`` and ``set_attn_implementation`` take the name, for
    ``forward``, ``generate`` and continuous batching. Attention and mask function are registered together:
    without the second, Transformers would make no mask at all.
    """
    AttentionInterface.register(NAME, either)
    AttentionMaskInterface.register(NAME, attention_mask)
    _accept_name()
    paged.install()


def either(
    module: nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """Attention of continuous batching where its batch is among the arguments, of a plain forward elsewhere.

    Args:
        module: the layer.
        query: (batch, heads_q, q_len, head_dim).
        key: (batch, heads_kv, keys, head_dim), or what a :class:`FlashCache` holds for the layer.
        value: as ``key``.
        attention_mask: None, or what our mask function made.
        arguments: of the layer and, in continuous batching, of the batch.

    Returns:
        out, and None in the place of the weights.
    """
    attend = paged.attention if paged.is_batch(arguments) else attention
    return attend(module, query, key, value, attention_mask, **arguments)


def _accept_name() -> None:
    """Let Transformers take our name for what it is.

    It takes every name with "flash" in it for a package to be imported or fetched, and models with a list of
    such packages (gpt-oss) fall back to the first of it. For our name, and no other, the check that it is
    registered is all there is to do.
    """

    def made(check: Callable[..., str]) -> Callable[..., str]:
        def checked(self: PreTrainedModel, attn_implementation: str | None, *rest: Any, **named: Any) -> str:
            if attn_implementation in OURS:
                return self.get_correct_attn_implementation(attn_implementation)
            return check(self, attn_implementation, *rest, **named)

        return checked

    teach(PreTrainedModel, "_check_and_adjust_attn_implementation", made)
