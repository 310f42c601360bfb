"""What flash-attn's functions refuse here: by name, and before anything is written."""

from __future__ import annotations

import pytest

from flash_decoding import Unsupported
from flash_decoding.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from tests.refusals import (
    Arguments,
    Refusal,
    append_arguments,
    assert_refused,
    attention_arguments,
    floats,
    ints,
)

TABLES: Arguments = {"rotary_cos": floats(8, 4), "rotary_sin": floats(8, 4)}
KVCACHE_REFUSALS: list[Refusal] = [
    ("v_without_k", {"k": None}, "k", "None", "new tokens to go with v"),
    ("k_without_v", {"v": None}, "v", "None", "new tokens to go with k"),
    ("no_lengths", {"cache_seqlens": None}, "cache_seqlens", "None", "where k and v go"),
    ("rotary_without_k", TABLES | {"k": None, "v": None}, "rotary_cos", "without k and v", "k and v too"),
    (
        "sin_without_k",
        TABLES | {"k": None, "v": None, "rotary_cos": None},
        "rotary_cos",
        "without",
        "k and v",
    ),
    ("cos_alone", {"rotary_cos": floats(8, 4)}, "rotary_sin", "None", "goes with rotary_cos"),
    ("beyond", {"cache_seqlens": 7}, "cache_seqlens", "7", "an int from 0 to 6 (8 slots, 2 for new tokens)"),
    ("k_rank", {"k": floats(2, 2, 16)}, "k", "3 dimensions", "(batch, new_len, heads_kv, head_dim)"),
    ("k_batch", {"k": floats(1, 2, 2, 16)}, "k", "(1, 2, 2, 16)", "(2, 2, 2, 16)"),
    ("splits", {"num_splits": 200}, "num_splits", "200", "to 128"),
    ("sinks", {"sinks": floats(2)}, "sinks", "(2,)", "(4,)"),
    ("window", {"window_size": (-3, 0)}, "window_size", "(-3, 0)", "each -1 (unbounded) or more"),
]


@pytest.mark.parametrize("refusal", KVCACHE_REFUSALS, ids=[refusal[0] for refusal in KVCACHE_REFUSALS])
def test_kvcache_refuses_before_it_writes(refusal: Refusal) -> None:
    good = append_arguments() | {"q": floats(2, 1, 4, 16)}
    assert_refused(flash_attn_with_kvcache, good, refusal)
    assert good["k_cache"].count_nonzero() == 0
    assert good["v_cache"].count_nonzero() == 0


DENSE_REFUSALS: list[Refusal] = [
    (
        "k_batch",
        {"k": floats(3, 8, 2, 16), "v": floats(3, 8, 2, 16)},
        "k",
        "3 sequences",
        "2, the batch of q",
    ),
    ("k_few", {"k": floats(1, 8, 2, 16), "v": floats(1, 8, 2, 16)}, "k", "1 rows", "2 or more"),
    ("v_shape", {"v": floats(2, 7, 2, 16)}, "v", "(2, 7, 2, 16)", "those of k"),
    ("heads", {"q": floats(2, 1, 3, 16)}, "q", "3 heads", "a multiple of the 2 key/value heads"),
    ("head_dim", {"q": floats(2, 1, 4, 20)}, "q", "head_dim 20", "a multiple of 8"),
]


@pytest.mark.parametrize("refusal", DENSE_REFUSALS, ids=[refusal[0] for refusal in DENSE_REFUSALS])
def test_dense_refuses(refusal: Refusal) -> None:
    good = {"q": floats(2, 1, 4, 16), "k": floats(2, 8, 2, 16), "v": floats(2, 8, 2, 16)}
    assert_refused(flash_attn_func, good, refusal)


VARLEN_REFUSALS: list[Refusal] = [
    ("q_rank", {"q": floats(1, 3, 4, 16)}, "q", "4 dimensions", "(total_q, heads_q, head_dim)"),
    ("k_rank", {"k": floats(1, 9, 2, 16)}, "k", "4 dimensions", "(total_k, heads_kv, head_dim)"),
    ("v_tokens", {"v": floats(8, 2, 16)}, "v", "(2, 8, 2, 16)", "those of k"),
    ("heads", {"q": floats(3, 3, 16)}, "q", "3 heads", "a multiple of the 2 key/value heads"),
    ("offsets", {"cu_seqlens_k": ints(0, 9)}, "cu_seqlens_k", "(2,)", "(3,), as cu_seqlens_q"),
    ("offsets_dtype", {"cu_seqlens_k": ints(0, 3, 9).long()}, "cu_seqlens_k", "torch.int64", "torch.int32"),
    ("longest_q", {"max_seqlen_q": 0}, "max_seqlen_q", "0", "an int >= 1"),
    ("longest_k", {"max_seqlen_k": -1}, "max_seqlen_k", "-1", "an int, 0 or more"),
    ("table", {"block_table": ints(0, 1)[None]}, "k", "3 dimensions", "4 dimensions"),
]


def varlen_arguments() -> Arguments:
    offsets = {"cu_seqlens_q": ints(0, 1, 3), "cu_seqlens_k": ints(0, 3, 9)}
    sizes = {"max_seqlen_q": 2, "max_seqlen_k": 6}
    return {"q": floats(3, 4, 16), "k": floats(9, 2, 16), "v": floats(9, 2, 16)} | offsets | sizes


@pytest.mark.parametrize("refusal", VARLEN_REFUSALS, ids=[refusal[0] for refusal in VARLEN_REFUSALS])
def test_varlen_refuses(refusal: Refusal) -> None:
    assert_refused(flash_attn_varlen_func, varlen_arguments(), refusal)


def test_pages_of_varlen_hold_the_longest_sequence() -> None:
    pages = {"k": floats(4, 4, 2, 16), "v": floats(4, 4, 2, 16), "block_table": ints(0, 1, 2, 3).view(2, 2)}
    refusal = ("longest", pages | {"max_seqlen_k": 9}, "max_seqlen_k", "9", "at most 8")
    assert_refused(flash_attn_varlen_func, varlen_arguments(), refusal)


def test_dropout_and_backward_are_refused_by_name() -> None:
    q = floats(2, 1, 4, 16)
    dense: Arguments = {"q": q, "k": floats(2, 8, 2, 16), "v": floats(2, 8, 2, 16)}
    with pytest.raises(Unsupported, match=r"dropout_p=0\.1\n.*pass dropout_p=0\.0"):
        flash_attn_func(**dense, dropout_p=0.1)
    with pytest.raises(Unsupported, match=r"dropout_p=0\.1"):
        flash_attn_varlen_func(**varlen_arguments(), dropout_p=0.1)
    with pytest.raises(Unsupported, match="backward through v"):
        flash_attn_func(**dense | {"v": dense["v"].clone().requires_grad_()})
    with pytest.raises(Unsupported, match="backward through k"):
        flash_attn_varlen_func(**varlen_arguments() | {"k": floats(9, 2, 16).requires_grad_()})
    with pytest.raises(Unsupported, match="backward through q"):
        flash_attn_with_kvcache(**attention_arguments() | {"q": q.clone().requires_grad_()})
