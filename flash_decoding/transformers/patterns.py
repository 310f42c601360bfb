"""What a mask function of Transformers hides: recognised by its structure, or refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import CodeType, FunctionType
from typing import Any

import torch
from transformers import masking_utils

from flash_decoding.errors import Unsupported

MaskFunction = Callable[..., Any]


@dataclass(frozen=True)
class Pattern:
    """Causal or bidirectional; ``window`` keys visible, a token's own among them, or all (None).

    Where rows are ``packed`` they are several sequences, and all this holds inside of each.
    """

    causal: bool
    window: int | None = None
    packed: bool = False


CAUSAL, BIDIRECTIONAL = Pattern(causal=True), Pattern(causal=False)

# Functions made by one line of source share their code, whatever they were made for.
_AND_CODE = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_WINDOW_CODE = masking_utils.sliding_window_overlay(1).__code__
_PACKED_CODE = masking_utils.packed_sequence_mask_function(torch.zeros(1, 1)).__code__
_AND_NAME = masking_utils.and_masks(masking_utils.causal_mask_function).__qualname__

_KNOWN = "causal, causal with a sliding window, and bidirectional masks are known, each with padding"


def recognise(
    mask_function: MaskFunction, q_length: int, call: Mapping[str, Any], *, compiling: bool
) -> Pattern:
    """The pattern of a mask function.

    Args:
        mask_function: as Transformers hands it to a mask function of an attention implementation.
        q_length: query tokens of the call.
        call: the further arguments of that call (``local_size``, ``config``, ``use_vmap``,
            ``allow_is_causal_skip``).
        compiling: while ``torch.compile`` traces, functions cannot be looked into; those arguments tell.

    Raises:
        Unsupported: another mask; the message names its parts.
    """
    pattern = _plain(mask_function)
    if pattern is not None:
        return pattern
    if not compiling:
        pattern = _composed(mask_function)
    elif (window := _traced_window(mask_function, q_length, call)) is not None:
        pattern = Pattern(causal=True, window=window)
    if pattern is None:
        reasons = [_KNOWN]
        if compiling:
            reasons.append(
                "without a cache and a (batch, tokens) mask, traced models ask for packed sequences"
            )
        name = mask_function.__qualname__ if compiling else _describe(mask_function)
        raise Unsupported(f"the mask {name}", tuple(reasons))
    return pattern


def _plain(mask_function: MaskFunction) -> Pattern | None:
    if mask_function is masking_utils.causal_mask_function:
        return CAUSAL
    return BIDIRECTIONAL if mask_function is masking_utils.bidirectional_mask_function else None


def _composed(mask_function: MaskFunction) -> Pattern | None:
    """ "Inside the window and causal", "in the same sequence and causal", or both: no other one is known."""
    parts = [_unmapped(part) for part in _parts(mask_function)]
    if len(parts) != 2:
        return None
    for part, rest in (parts, parts[::-1]):
        if _is_made_by(_PACKED_CODE, part):
            inside = _plain(rest) or _composed(rest)
            known = inside is not None and inside.causal and not inside.packed
            return replace(inside, packed=True) if inside is not None and known else None
        if _is_made_by(_WINDOW_CODE, part) and rest is masking_utils.causal_mask_function:
            return Pattern(causal=True, window=_cells(part)["sliding_window"])
    return None


def _unmapped(part: MaskFunction) -> MaskFunction:
    """Without the shift to positions inside of packed sequences, which newer releases put around a mask."""
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    if remap is None or not _is_made_by(remap(part, torch.zeros(1, 1)).__code__, part):
        return part
    inside: MaskFunction = _cells(part)["mask_function"]
    return inside


def _is_made_by(code: CodeType, function: MaskFunction) -> bool:
    return isinstance(function, FunctionType) and function.__code__ is code


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
    if _is_made_by(_AND_CODE, mask_function):
        return tuple(_cells(mask_function)["mask_functions"])
    return ()


def _cells(function: MaskFunction) -> dict[str, Any]:
    """Variables of the enclosing call that a function keeps, by name."""
    assert isinstance(function, FunctionType)
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _describe(mask_function: MaskFunction) -> str:
    name = getattr(mask_function, "__qualname__", type(mask_function).__name__).split(".<locals>")[0]
    if not isinstance(mask_function, FunctionType):
        return name
    parts = _cells(mask_function).get("mask_functions", ())
    return f"{name}({', '.join(_describe(part) for part in parts)})" if parts else name
