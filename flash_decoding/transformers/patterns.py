"""What a mask function of Transformers hides: recognised by its structure, or refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from transformers import masking_utils

from flash_decoding.errors import Unsupported

MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class Pattern:
    """Causal or bidirectional; ``window`` keys visible, a token's own among them, or all (None)."""

    causal: bool
    window: int | None = None


CAUSAL, BIDIRECTIONAL = Pattern(causal=True), Pattern(causal=False)

# Functions made by one line of source share their code, whatever they were made for.
_AND_CODE = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW_CODE = masking_utils.sliding_window_overlay(1).__code__
_AND_NAME = masking_utils.and_masks(masking_utils.causal_mask_function).__qualname__

_KNOWN = "causal, causal with a sliding window, and bidirectional masks are known, each with padding"


def recognise(
    mask_function: MaskFunction, q_length: int, call: Mapping[str, Any], *, tracing: bool
) -> Pattern:
    """The pattern of a mask function.

    Args:
        mask_function: as Transformers hands it to a mask function of an attention implementation.
        q_length: query tokens of the call.
        call: the further arguments of that call (``local_size``, ``config``, ``use_vmap``,
            ``allow_is_causal_skip``).
        tracing: while ``torch.compile`` traces, functions cannot be looked into; those arguments tell.

    Raises:
        Unsupported: another mask; the message names its parts.
    """
    if mask_function is masking_utils.causal_mask_function:
        return CAUSAL
    if mask_function is masking_utils.bidirectional_mask_function:
        return BIDIRECTIONAL
    window = _traced_window(mask_function, q_length, call) if tracing else _window(mask_function)
    if window is None:
        reasons = [_KNOWN]
        if tracing:
            reasons.append(
                "without a cache and a (batch, tokens) mask, traced models ask for packed sequences"
            )
        name = mask_function.__qualname__ if tracing else _describe(mask_function)
        raise Unsupported(f"the mask {name}", tuple(reasons))
    return Pattern(causal=True, window=window)


def _window(mask_function: MaskFunction) -> int | None:
    """Window of "inside the window and causal", the only intersection that is known."""
    parts = _parts(mask_function)
    if len(parts) != 2 or masking_utils.causal_mask_function not in parts:
        return None
    for part in parts:
        if isinstance(part, FunctionType) and part.__code__ is _WINDOW_CODE:
            window: int = _cells(part)["sliding_window"]
            return window
    return None


def _traced_window(mask_function: MaskFunction, q_length: int, call: Mapping[str, Any]) -> int | None:
    size, config = call.get("local_size"), call.get("config")
    # Whatever is added to the plain patterns forbids to skip the mask. One token of a compilable cache does
    # so too; there, packed sequences are out of the question and all other additions have other signs.
    is_plain = call.get("allow_is_causal_skip", True) or q_length == 1
    is_bare = mask_function.__qualname__ == _AND_NAME and not call.get("use_vmap", False) and is_plain
    is_window = size == getattr(config, "sliding_window", None)
    is_chunk = size == getattr(config, "attention_chunk_size", None)
    return size if is_bare and is_window and not is_chunk else None


def _parts(mask_function: MaskFunction) -> tuple[MaskFunction, ...]:
    if isinstance(mask_function, FunctionType) and mask_function.__code__ is _AND_CODE:
        return tuple(_cells(mask_function)["mask_functions"])
    return ()


def _cells(function: FunctionType) -> dict[str, Any]:
    """Variables of the enclosing call that a function keeps, by name."""
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _describe(mask_function: MaskFunction) -> str:
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__).split(".<locals>")[0]
    if not isinstance(mask_function, FunctionType):
        return name
    parts = _cells(mask_function).get("mask_functions", ())
    return f"{name}({', '.join(_describe(part) for part in parts)})" if parts else name
