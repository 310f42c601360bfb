"""Calls that could be taken for one that was made before, for tests that make calls again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BATCH, CAPACITY, HEADS, HEADS_KV, DIM = 2, 4096, 8, 2, 64


def shifted(x: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of 16."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    return room.copy_(x)


def given(device: str = "cpu", **other: Any) -> dict[str, Any]:
    """Arguments of a call that splits, ``other`` in place of its own."""
    shapes = ((BATCH, 1, HEADS, DIM), *[(BATCH, CAPACITY, HEADS_KV, DIM)] * 2)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for shape in shapes)
    lengths = torch.tensor([CAPACITY, CAPACITY // 3], dtype=torch.int32, device=device)
    return {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": lengths} | other


def wide(x: Tensor) -> Tensor:
    """The same with other strides."""
    return torch.cat((x, x), dim=2)[:, :, : x.shape[2]]


def variants(device: str = "cpu") -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls that could be taken for the plain one, and are not or are."""
    own = given(device)

    def plain(**other: Any) -> dict[str, Any]:
        return own | other

    for name in own:
        yield f"{name} elsewhere", plain(**{name: own[name].clone()})
        yield f"{name} not aligned", plain(**{name: shifted(own[name])})
    for name in ("q", "k_cache", "v_cache"):
        yield f"{name} strided", plain(**{name: wide(own[name])})
    yield "batch of 1", plain(**{name: x[:1] for name, x in own.items()})
    yield "batch of 1 of many", plain(q=own["q"][:1], cache_seqlens=own["cache_seqlens"][:1])
    yield "batch of 16", plain(**{name: torch.cat([x] * 8) for name, x in own.items()})
    longer = {name: torch.cat((own[name], own[name][:, :1]), 1) for name in ("k_cache", "v_cache")}
    yield "capacity of 4097", plain(**longer)
    yield "capacity of 1", plain(**{name: own[name][:, :1] for name in ("k_cache", "v_cache")})
    yield "float16", plain(**{name: own[name].half() for name in ("q", "k_cache", "v_cache")})
    yield "lse", plain(return_lse=True)
    yield "scale 1", plain(softmax_scale=1)
    yield "window", plain(window_size=(1, 0))
    yield "splits", plain(num_splits=3)
    yield "one split", plain(num_splits=1)
    yield "invariant", plain(batch_invariant=True)
    yield "padded", plain(cache_leftpad=torch.ones(BATCH, dtype=torch.int32, device=device))
    yield "rows", plain(cache_batch_idx=torch.ones(BATCH, dtype=torch.int32, device=device))
    yield "masked", plain(key_mask=torch.ones(BATCH, CAPACITY, dtype=torch.bool, device=device))
    yield "sinks", plain(sinks=torch.nn.Parameter(torch.randn(HEADS, device=device), requires_grad=False))
    yield "sinks not aligned", plain(sinks=shifted(torch.randn(HEADS, device=device)))
    yield "alibi", plain(alibi_slopes=torch.randn(HEADS, device=device))
    pool = {name: own[name].view(-1, 16, HEADS_KV, DIM) for name in ("k_cache", "v_cache")}
    pages = torch.arange(BATCH * CAPACITY // 16, dtype=torch.int32, device=device).flip(0)
    yield "paged", plain(**pool, block_table=pages.view(BATCH, -1))
