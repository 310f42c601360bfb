"""Calls that have to be refused, as data: what is changed in a good call, and what the error has to say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_decoding import InvalidInput

HEADS_Q, HEADS_KV, DIM, CAPACITY, BATCH = 4, 2, 16, 8, 2

Arguments = dict[str, Any]
Refusal = tuple[str, Arguments, str, str, str]
"""Name, changed arguments, then of the error: the argument, part of what it got, part of what it wanted."""


def floats(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def bools(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def attention_arguments() -> Arguments:
    return {
        "q": floats(BATCH, 1, HEADS_Q, DIM),
        "k_cache": floats(BATCH, CAPACITY, HEADS_KV, DIM),
        "v_cache": floats(BATCH, CAPACITY, HEADS_KV, DIM),
        "cache_seqlens": ints(3, 8),
    }


def ragged_arguments() -> Arguments:
    ragged = {"q": floats(3, HEADS_Q, DIM), "cu_seqlens_q": ints(0, 1, 3), "max_q_len": 2}
    return attention_arguments() | ragged


def append_arguments() -> Arguments:
    return {
        "k": floats(BATCH, 2, HEADS_KV, DIM) + 1,
        "v": floats(BATCH, 2, HEADS_KV, DIM) + 1,
        "k_cache": floats(BATCH, CAPACITY, HEADS_KV, DIM),
        "v_cache": floats(BATCH, CAPACITY, HEADS_KV, DIM),
        "cache_seqlens": ints(3, 6),
    }


def merge_arguments() -> Arguments:
    return {"outs": floats(3, BATCH, 1, HEADS_Q, DIM), "lses": floats(3, BATCH, HEADS_Q, 1)}


def paged() -> Arguments:
    return {
        "k_cache": floats(6, 4, HEADS_KV, DIM),
        "v_cache": floats(6, 4, HEADS_KV, DIM),
        "block_table": torch.zeros(BATCH, 2, dtype=torch.int32),
    }


ROTARY: Arguments = {"rotary_cos": floats(CAPACITY, 4), "rotary_sin": floats(CAPACITY, 4)}

ATTENTION_REFUSALS: list[Refusal] = [
    ("q_is_no_tensor", {"q": [1.0]}, "q", "list", "a tensor (batch, q_len, heads_q, head_dim)"),
    ("q_rank", {"q": floats(2, 4, 16)}, "q", "3 dimensions, (2, 4, 16)", "4 dimensions"),
    ("q_dtype", {"q": floats(2, 1, 4, 16, dtype=torch.int64)}, "q", "torch.int64", "float16, bfloat16"),
    ("q_stride", {"q": floats(2, 1, 16, 4).mT}, "q", "strides (64, 64, 1, 4)", "a contiguous last dimension"),
    ("batch_0", {"q": floats(0, 1, 4, 16)}, "q", "(0, 1, 4, 16)", "without a zero"),
    ("q_len_0", {"q": floats(2, 0, 4, 16)}, "q", "(2, 0, 4, 16)", "without a zero"),
    ("head_dim_wide", {"q": floats(2, 1, 4, 264)}, "q", "head_dim 264", "a multiple of 8 from 8 to 256"),
    ("head_dim_odd", {"q": floats(2, 1, 4, 20)}, "q", "head_dim 20", "a multiple of 8"),
    ("k_rank", {"k_cache": floats(8, 2, 16)}, "k_cache", "3 dimensions", "4 dimensions"),
    (
        "k_dtype",
        {"k_cache": floats(2, 8, 2, 16).half()},
        "k_cache",
        "torch.float16",
        "torch.float32, the dtype of q",
    ),
    ("k_device", {"k_cache": floats(2, 8, 2, 16, device="meta")}, "k_cache", "device meta", "device cpu"),
    ("k_stride", {"k_cache": floats(2, 8, 16, 2).mT}, "k_cache", "strides", "a contiguous last dimension"),
    ("k_head_dim", {"k_cache": floats(2, 8, 2, 24)}, "k_cache", "head_dim 24", "head_dim 16, that of q"),
    (
        "k_rows",
        {"k_cache": floats(1, 8, 2, 16), "v_cache": floats(1, 8, 2, 16)},
        "k_cache",
        "1 rows",
        "2 or more",
    ),
    ("v_shape", {"v_cache": floats(2, 7, 2, 16)}, "v_cache", "(2, 7, 2, 16)", "(2, 8, 2)"),
    ("v_head_dim", {"v_cache": floats(2, 8, 2, 12)}, "v_cache", "head_dim 12", "a multiple of 8"),
    ("v_stride", {"v_cache": floats(2, 8, 16, 2).mT}, "v_cache", "strides", "a contiguous last dimension"),
    ("head_ratio", {"q": floats(2, 1, 5, 16)}, "q", "5 heads", "a multiple of the 2 key/value heads"),
    ("length_negative", {"cache_seqlens": -1}, "cache_seqlens", "-1", "an int from 0 to 8"),
    ("length_beyond", {"cache_seqlens": 9}, "cache_seqlens", "9", "an int from 0 to 8"),
    ("length_bool", {"cache_seqlens": True}, "cache_seqlens", "bool", "an int or a (batch,) int32 tensor"),
    ("length_float", {"cache_seqlens": 3.0}, "cache_seqlens", "float", "an int or a (batch,) int32 tensor"),
    (
        "lengths_int64",
        {"cache_seqlens": ints(3, 8, dtype=torch.int64)},
        "cache_seqlens",
        "torch.int64",
        "torch.int32",
    ),
    ("lengths_batch", {"cache_seqlens": ints(3)}, "cache_seqlens", "(1,)", "(2,), one entry per sequence"),
    ("lengths_rank", {"cache_seqlens": ints(3, 8)[:, None]}, "cache_seqlens", "2 dimensions", "(batch,)"),
    ("lengths_stride", {"cache_seqlens": ints(3, 8, 3, 8)[::2]}, "cache_seqlens", "strides (2,)", "stride 1"),
    (
        "lengths_device",
        {"cache_seqlens": ints(3, 8).to("meta")},
        "cache_seqlens",
        "device meta",
        "device cpu",
    ),
    ("leftpad", {"cache_leftpad": ints(1)}, "cache_leftpad", "(1,)", "(2,), one entry per sequence"),
    ("leftpad_dtype", {"cache_leftpad": floats(2)}, "cache_leftpad", "torch.float32", "torch.int32"),
    ("mask_list", {"key_mask": [True]}, "key_mask", "list", "a tensor (batch, columns)"),
    ("mask_rank", {"key_mask": bools(8)}, "key_mask", "1 dimensions", "2 dimensions, (batch, columns)"),
    ("mask_dtype", {"key_mask": floats(2, 8)}, "key_mask", "torch.float32", "torch.bool"),
    ("mask_int", {"key_mask": bools(2, 8).long()}, "key_mask", "torch.int64", "torch.bool: True where"),
    ("mask_rows", {"key_mask": bools(1, 8)}, "key_mask", "(1, 8)", "(2, columns), one row per sequence"),
    (
        "mask_stride",
        {"key_mask": bools(8, 2).mT},
        "key_mask",
        "strides (1, 2)",
        "a contiguous last dimension",
    ),
    ("mask_device", {"key_mask": bools(2, 8).to("meta")}, "key_mask", "device meta", "device cpu"),
    (
        "batch_idx",
        {"cache_batch_idx": ints(1, 0, 1)},
        "cache_batch_idx",
        "(3,)",
        "(2,), one entry per sequence",
    ),
    (
        "table_rank",
        paged() | {"block_table": ints(0, 1)},
        "block_table",
        "1 dimensions",
        "(batch, max_pages)",
    ),
    (
        "table_dtype",
        paged() | {"block_table": paged()["block_table"].long()},
        "block_table",
        "torch.int64",
        "torch.int32",
    ),
    (
        "table_rows",
        paged() | {"block_table": paged()["block_table"][:1]},
        "block_table",
        "1 rows",
        "2, one per sequence",
    ),
    ("length_beyond_pages", paged() | {"cache_seqlens": 9}, "cache_seqlens", "9", "an int from 0 to 8"),
    ("scale", {"softmax_scale": math.nan}, "softmax_scale", "nan", "a finite number"),
    ("scale_tensor", {"softmax_scale": floats()}, "softmax_scale", "tensor(0.)", "a finite number"),
    ("softcap_negative", {"softcap": -1.0}, "softcap", "-1.0", "a finite number, 0 or more"),
    ("softcap_infinite", {"softcap": math.inf}, "softcap", "inf", "a finite number, 0 or more"),
    ("window_negative", {"window_size": (-2, 0)}, "window_size", "(-2, 0)", "each -1 (unbounded) or more"),
    ("window_one", {"window_size": (4,)}, "window_size", "(4,)", "two ints"),
    ("window_int", {"window_size": 4}, "window_size", "4", "two ints"),
    ("window_none", {"window_size": (None, 0)}, "window_size", "(None, 0)", "two ints"),
    ("alibi_shape", {"alibi_slopes": floats(3)}, "alibi_slopes", "(3,)", "(4,) or (2, 4)"),
    ("alibi_dtype", {"alibi_slopes": floats(4).half()}, "alibi_slopes", "torch.float16", "torch.float32"),
    ("alibi_float", {"alibi_slopes": 0.5}, "alibi_slopes", "float", "a float32 tensor (4,) or (2, 4)"),
    ("sinks_shape", {"sinks": floats(2, 4)}, "sinks", "(2, 4)", "(4,)"),
    ("sinks_dtype", {"sinks": floats(4).double()}, "sinks", "torch.float64", "float32 or torch.bfloat16 or"),
    ("sinks_device", {"sinks": floats(4, device="meta")}, "sinks", "device meta", "device cpu"),
    ("splits_negative", {"num_splits": -1}, "num_splits", "-1", "an int from 0"),
    ("splits_many", {"num_splits": 129}, "num_splits", "129", "to 128"),
    ("splits_float", {"num_splits": 2.0}, "num_splits", "2.0", "an int from 0"),
]
RAGGED_REFUSALS: list[Refusal] = [
    ("q_rank", {"q": floats(2, 1, 4, 16)}, "q", "4 dimensions", "3 dimensions, (total_q, heads_q, head_dim)"),
    ("no_tokens", {"q": floats(0, 4, 16)}, "q", "(0, 4, 16)", "without a zero"),
    ("offsets_dtype", {"cu_seqlens_q": ints(0, 1, 3).long()}, "cu_seqlens_q", "torch.int64", "torch.int32"),
    ("offsets_empty", {"cu_seqlens_q": ints(0)}, "cu_seqlens_q", "(1,)", "batch >= 1"),
    (
        "offsets_device",
        {"cu_seqlens_q": ints(0, 1, 3).to("meta")},
        "cu_seqlens_q",
        "device meta",
        "device cpu",
    ),
    ("longest_0", {"max_q_len": 0}, "max_q_len", "0", "an int >= 1"),
    ("longest_tensor", {"max_q_len": ints(2)}, "max_q_len", "tensor", "an int >= 1"),
    ("batch_differs", {"cu_seqlens_q": ints(0, 1, 2, 3)}, "k_cache", "2 rows", "3 or more"),
    ("alibi_shape", {"alibi_slopes": floats(3, 4)}, "alibi_slopes", "(3, 4)", "(4,) or (2, 4)"),
]
APPEND_REFUSALS: list[Refusal] = [
    ("k_rank", {"k": floats(2, 2, 16)}, "k", "3 dimensions", "(batch, new_len, heads_kv, head_dim)"),
    ("k_heads", {"k": floats(2, 2, 1, 16)}, "k", "(2, 2, 1, 16)", "(2, 2, 2, 16)"),
    ("k_no_tokens", {"k": floats(2, 0, 2, 16)}, "k", "(2, 0, 2, 16)", "without a zero"),
    ("k_head_dim", {"k": floats(2, 2, 2, 8)}, "k_cache", "head_dim 16", "head_dim 8, that of k"),
    ("v_shape", {"v": floats(2, 1, 2, 16)}, "v", "(2, 1, 2, 16)", "(2, 2, 2, 16)"),
    (
        "v_dtype",
        {"v": floats(2, 2, 2, 16).half()},
        "v",
        "torch.float16",
        "torch.float32, the dtype of k_cache",
    ),
    ("cache_dtype", {"k_cache": floats(2, 8, 2, 16).half()}, "k_cache", "torch.float16", "the dtype of k"),
    ("too_long", {"k": floats(2, 9, 2, 16), "v": floats(2, 9, 2, 16)}, "k", "9 new tokens", "at most 8"),
    ("beyond_capacity", {"cache_seqlens": 7}, "cache_seqlens", "7", "0 to 6 (8 slots, 2 for new tokens)"),
    ("no_lengths", {"cache_seqlens": None}, "cache_seqlens", "None", "where new tokens go"),
    (
        "shared_rows",
        {"k_cache": floats(1, 8, 2, 16).expand(2, -1, -1, -1)},
        "k_cache",
        "strides (0, ",
        "own memory",
    ),
    ("q_alone", {"q": floats(2, 1, 4, 16)}, "q", "without rotary_cos", "together with rotary_cos"),
    ("q_batch", ROTARY | {"q": floats(1, 1, 4, 16)}, "q", "(1, 1, 4, 16)", "(2, q_len, heads_q, 16)"),
    ("q_dtype", ROTARY | {"q": floats(2, 1, 4, 16).half()}, "q", "torch.float16", "the dtype of k"),
    ("sin_missing", {"rotary_cos": ROTARY["rotary_cos"]}, "rotary_sin", "None", "goes with rotary_cos"),
    ("cos_missing", {"rotary_sin": ROTARY["rotary_sin"]}, "rotary_cos", "None", "goes with rotary_sin"),
    (
        "cos_rank",
        ROTARY | {"rotary_cos": floats(8)},
        "rotary_cos",
        "1 dimensions",
        "(positions, rotary_dim // 2)",
    ),
    (
        "sin_shape",
        ROTARY | {"rotary_sin": floats(8, 3)},
        "rotary_sin",
        "(8, 3)",
        "(8, 4), the shape of rotary_cos",
    ),
    (
        "cos_dtype",
        ROTARY | {"rotary_cos": floats(8, 4).half()},
        "rotary_cos",
        "torch.float16",
        "torch.float32",
    ),
    ("cos_short", {n: t[:7] for n, t in ROTARY.items()}, "rotary_cos", "7 positions", "8 or more"),
    ("cos_wide", {n: floats(8, 9) for n in ROTARY}, "rotary_cos", "rotary_dim 18", "2 to 16, the head_dim"),
]
MERGE_REFUSALS: list[Refusal] = [
    ("outs_rank", {"outs": floats(3, 4, 16)}, "outs", "3 dimensions", "5 dimensions"),
    (
        "no_parts",
        {"outs": floats(0, 2, 1, 4, 16), "lses": floats(0, 2, 4, 1)},
        "outs",
        "(0, ",
        "without a zero",
    ),
    ("no_sequence", {"outs": []}, "outs", "shapes []", "one tensor or more"),
    ("uneven", {"outs": [floats(2, 1, 4, 16), floats(2, 2, 4, 16)]}, "outs", "shapes", "all of one shape"),
    ("lses_dtype", {"lses": floats(3, 2, 4, 1).half()}, "lses", "torch.float16", "torch.float32"),
    ("lses_shape", {"lses": floats(3, 2, 1, 4)}, "lses", "(3, 2, 1, 4)", "(3, 2, 4, 1), to go with outs"),
    ("lses_rank", {"lses": floats(3, 4, 1)}, "lses", "3 dimensions", "4 dimensions"),
    ("lses_device", {"lses": floats(3, 2, 4, 1, device="meta")}, "lses", "device meta", "device cpu"),
]


def assert_refused(call: Callable[..., Any], good: Arguments, refusal: Refusal) -> None:
    _, changes, argument, got, wanted = refusal
    with pytest.raises(InvalidInput) as caught:
        call(**(good | changes))
    error = caught.value
    assert error.argument == argument
    assert got in str(error.got)
    assert wanted in error.wanted
    assert str(error) == f"{argument}: got {error.got}; wanted {error.wanted}"
