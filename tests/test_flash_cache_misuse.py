"""FlashCache refuses by name, before anything is written, and goes on as if nothing had been asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_decoding.errors import CacheFull, InvalidInput
from flash_decoding.transformers import FlashCache
from tests.flash_cache_tools import PAGE_SIZES, make_cache, states, update
from tests.transformers_tools import make_model, with_attention


def filled(cache: FlashCache) -> None:
    update(cache, 2, 5)


def both(cache: FlashCache, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    k, v = states(cache, 2)
    return change(k), change(v)


def twice(cache: FlashCache) -> None:
    with cache.step(1):
        update(cache, 2)
        update(cache, 2)


def inside(cache: FlashCache, call: Callable[[], object]) -> None:
    with cache.step(1):
        call()


MISUSE: dict[str, tuple[str, Callable[[FlashCache], object]]] = {
    "another batch": ("key_states", lambda c: c.update(*states(c, 1), 0)),
    "no tokens": ("key_states", lambda c: c.update(*states(c, 2, 0), 0)),
    "heads": ("key_states", lambda c: c.update(*both(c, lambda x: x.repeat(1, 2, 1, 1)), 0)),
    "head_dim of values": ("value_states", lambda c: c.update(states(c, 2)[0], states(c, 2)[1][..., :8], 0)),
    "values of other length": ("value_states", lambda c: c.update(states(c, 2)[0], states(c, 2, 2)[1], 0)),
    "dtype": ("key_states", lambda c: c.update(*both(c, Tensor.double), 0)),
    "strides": ("key_states", lambda c: c.update(*both(c, lambda x: torch.stack((x, x), -1)[..., 0]), 0)),
    "layers out of order": ("layer_idx", lambda c: c.update(*states(c, 2), 1)),
    "q_len of the step": ("key_states", lambda c: inside(c, lambda: c.update(*states(c, 2, 2), 0))),
    "two forwards a step": ("layer_idx", twice),
    "a step in a step": ("step", lambda c: inside(c, lambda: inside(c, lambda: None))),
    "truncate in a step": ("truncate", lambda c: inside(c, lambda: c.truncate([1, 1]))),
    "reset in a step": ("reset", lambda c: inside(c, c.reset)),
    "begin without a step": ("begin", lambda c: c.begin()),
    "begin after a layer": ("layer_idx", lambda c: inside(c, lambda: (c.begin(), c.begin()))),
    "rows that are not there": ("rows", lambda c: c.step(1, rows=[0, 2]).__enter__()),
    "rows named twice": ("rows", lambda c: c.step(1, rows=[0, 0]).__enter__()),
    "no rows": ("rows", lambda c: c.step(1, rows=[]).__enter__()),
    "counts": ("tokens", lambda c: c.step([1], rows=[0, 1]).__enter__()),
    "negative counts": ("tokens", lambda c: c.step([1, -1]).__enter__()),
    "no tokens at all": ("q_len", lambda c: c.step(0).__enter__()),
    "q_len below the counts": ("q_len", lambda c: c.step([3, 1], q_len=2).__enter__()),
    "longer than it is": ("lengths", lambda c: c.truncate([5, 6])),
    "lengths of one row": ("lengths", lambda c: c.truncate([1])),
    "crop": ("lengths", lambda c: c.crop(-6)),
    "beams": ("beam_idx", lambda c: c.reorder_cache(torch.tensor([0]))),
    "repeats": ("rows", lambda c: c.batch_repeat_interleave(2)),
    "indices": ("rows", lambda c: c.batch_select_indices(torch.tensor([2]))),
}


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_named_and_changes_nothing(case: str, page_size: int) -> None:
    cache = make_cache(make_model("llama"), batch=2, page_size=page_size)
    filled(cache)
    kept = cache.storage.keys.clone()
    argument, call = MISUSE[case]
    with pytest.raises(InvalidInput) as caught:
        call(cache)
    assert caught.value.argument == argument
    assert cache.lengths == [5, 5] == cache.storage.cache_seqlens.tolist()
    if not page_size and case != "two forwards a step":
        assert kept[:, :, :6].nan_to_num().equal(cache.storage.keys[:, :, :6].nan_to_num())
    update(cache, 2)
    assert cache.lengths == [6, 6]


FULL: dict[str, Callable[[FlashCache], object]] = {
    "forward": lambda c: update(c, 2, 20),
    "step": lambda c: c.step(20).__enter__(),
    "one row": lambda c: c.step([20, 1]).__enter__(),
    "padding": lambda c: c.step([11, 12], q_len=20).__enter__(),
}


@pytest.mark.parametrize("case", FULL)
@pytest.mark.parametrize("sizes", [{"capacity": 24}, {"capacity": 24, "page_size": 8, "num_pages": 5}])
def test_a_full_cache_refuses_before_anything_is_written(case: str, sizes: dict[str, int]) -> None:
    cache = make_cache(make_model("llama"), batch=2, **sizes)
    filled(cache)
    kept = cache.storage.keys.clone()
    with pytest.raises(CacheFull, match="wanted at most"):
        FULL[case](cache)
    assert cache.lengths == [5, 5] == cache.storage.cache_seqlens.tolist()
    assert kept.nan_to_num().equal(cache.storage.keys.nan_to_num())
    update(cache, 2, 3)
    assert cache.lengths == [8, 8]


def test_a_backward_pass_is_refused_before_anything_is_written() -> None:
    model = with_attention(make_model("llama"), "flash_decoding")
    cache = make_cache(model, batch=1)
    with pytest.raises(NotImplementedError, match="backward through key_states"):
        model(torch.ones(1, 3, dtype=torch.int64), past_key_values=cache)
    assert cache.lengths == [0]
