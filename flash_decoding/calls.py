"""From the arguments of the public functions to the operators, through the checks where these are due."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from flash_decoding import eager, ops, repeats, validate

TENSORS, LENGTHS = 11, 3
"""How many tensors a call may have, and which of them says how many keys live."""


def attend(
    tensors: tuple[Any, ...], numbers: tuple[Any, ...], window_size: Any, *, ragged: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache, checked and run; or run at once, where a caller passed the like before.

    Args:
        tensors: as :mod:`flash_decoding.repeats` lists them, as they came: nothing is checked.
        numbers: max_q_len, softmax_scale, causal, softcap, num_splits, batch_invariant, return_lse; likewise.
        window_size: likewise.
        ragged: whether queries are packed.
    """
    kind = None
    # A compiler that traces this is told first: it is to see nothing of the rest.
    if not is_compiling() and type(window_size) is tuple:
        known_by = (ragged, *numbers, *window_size)
        types = (*map(type, tensors), *map(type, known_by))
        present = _present(types)
        if present is not None and eager.is_unwatched(tensors[0]):
            kind, addresses = repeats.kind_of_present(present(tensors), known_by, types)
            steps = repeats.find(kind)
            if steps is not None:
                out, lse = steps(addresses)
                return out if lse is None else (out, lse)
    return _checked(tensors, numbers, window_size, ragged=ragged, kind=kind)


@functools.lru_cache(maxsize=repeats.MAX_KEPT)
def _present(types: tuple[type, ...]) -> Callable[[tuple[Any, ...]], tuple[Tensor, ...]] | None:
    """Takes the tensors that there are out of all; None where a call of these types is known by no kind."""
    tensors, numbers = types[:TENSORS], types[TENSORS:]
    places = [place for place, x in enumerate(tensors) if x is not type(None)]
    has_kind = eager.are_plain(tensors) and repeats.are_numbers(numbers) and {0, LENGTHS} <= {*places}
    return operator.itemgetter(*places) if has_kind else None


def _checked(
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    window_size: Any,
    *,
    ragged: bool,
    kind: repeats.Kind | None,
) -> Tensor | tuple[Tensor, Tensor]:
    q, k_cache, v_cache, lengths, table, batch_idx, leftpad, mask, cu_seqlens_q, alibi_slopes, sinks = tensors
    max_q_len, softmax_scale, causal, softcap, num_splits, batch_invariant, return_lse = numbers
    queries = validate.ragged_queries(q, cu_seqlens_q, max_q_len) if ragged else validate.queries(q)
    cache = validate.kv_cache(
        queries,
        k_cache,
        v_cache,
        cache_seqlens=lengths,
        block_table=table,
        cache_batch_idx=batch_idx,
        cache_leftpad=leftpad,
    )
    options = validate.options(
        queries,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    validate.num_splits(num_splits)
    out, lse = ops.attention(
        queries,
        validate.masked(cache, mask),
        options,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        return_lse=return_lse,
        kind=kind,
    )
    return (out, lse) if return_lse else out
