"""FlashCache step by step: what a forward launches, ragged rows, rows chosen, failures without a trace."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flash_decoding import settings
from flash_decoding.errors import InvalidInput
from flash_decoding.transformers import FlashCache
from tests.flash_cache_tools import (
    FAMILIES,
    PAGE_SIZES,
    decode,
    eager_tokens,
    forward,
    make_cache,
    poison,
    prefill,
    prompts_of,
    states,
    update,
)
from tests.transformers_tools import make_model, with_attention

VIEWS = {"transpose", "slice", "select"}
NEW = 9


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that do work: views are no launches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1].rstrip("_")
        if name not in VIEWS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_step_launches_one_append_a_layer_and_two_for_the_lengths(page_size: int) -> None:
    cache = make_cache(make_model("llama"), batch=3, page_size=page_size)
    update(cache, 3, 5)
    update(cache, 3)
    new = [states(cache, 3) for _ in range(len(cache))]
    with Launches() as launches:
        for layer, (k, v) in enumerate(new):
            handles = cache.update(k, v, layer)
            assert handles[0] is handles[1]
    assert launches.seen == {"copy": 1, "addcmul": 1, "append_kv": len(cache)}


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_prompts_padded_on_the_right(family: str, page_size: int) -> None:
    model = make_model(family)
    prompts = prompts_of(11, 1, 6)
    cache = make_cache(model, batch=3, page_size=page_size)
    first = prefill(model, cache, prompts)
    assert cache.lengths == [11, 1, 6] == cache.storage.cache_seqlens.tolist()
    assert decode(model, cache, first, NEW) == eager_tokens(model, prompts, NEW)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_rows_are_filled_in_any_order_and_in_pieces(page_size: int) -> None:
    model = make_model("gemma2")
    prompts = prompts_of(7, 10, 4, 12)
    cache = make_cache(model, batch=4, page_size=page_size)
    first = torch.zeros(4, dtype=torch.int64)
    prefill(model, cache, [prompts[3][:5], prompts[0][:2]], rows=[3, 0])
    first[1:3] = prefill(model, cache, prompts[1:3], rows=slice(1, 3))
    first[[0, 3]] = prefill(model, cache, [prompts[0][2:], prompts[3][5:]], rows=[0, 3])
    assert cache.lengths == [7, 10, 4, 12] == cache.storage.cache_seqlens.tolist()
    assert decode(model, cache, first, NEW) == eager_tokens(model, prompts, NEW)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_row_that_has_ended_keeps_its_length_and_its_tokens(page_size: int) -> None:
    model = make_model("mistral")
    prompts = prompts_of(5, 8)
    cache = make_cache(model, batch=2, capacity=16, page_size=page_size)
    newest = prefill(model, cache, prompts)
    found = [[token] for token in newest.tolist()]
    for row in [1] * 8 + [0] * 6:
        with torch.no_grad(), settings.checking(), cache.step([int(row == 0), int(row == 1)], q_len=1):
            newest[row] = forward(model, cache, newest[:, None])[row, -1].argmax()
        found[row].append(int(newest[row]))
    assert cache.lengths == [11, 16] == cache.storage.cache_seqlens.tolist()
    assert found == [
        tokens[:new] for tokens, new in zip(eager_tokens(model, prompts, NEW), (7, 9), strict=True)
    ]


def test_rejected_drafts_leave_no_trace() -> None:
    model = make_model("gemma2")
    prompts = prompts_of(9, 3)
    cache = make_cache(model, batch=2, page_size=4)
    first = prefill(model, cache, prompts)
    drafts = torch.cat((first[:, None], torch.randint(3, 90, (2, 4))), dim=1)
    with cache.step(5), torch.no_grad():
        logits = forward(model, cache, drafts)
    wanted = eager_tokens(model, prompts, NEW)
    assert logits[:, 0].argmax(dim=-1).tolist() == [row[1] for row in wanted]
    cache.truncate([9, 3])
    assert decode(model, cache, first, NEW) == wanted


def test_a_forward_that_fails_half_way_is_not_forgotten() -> None:
    model = make_model("llama")
    prompts = prompts_of(6)
    cache = make_cache(model, batch=1)
    first = prefill(model, cache, prompts)
    k, v = states(cache, 1)
    cache.update(k, v, 0)
    for call in (lambda: cache.update(k, v, 0), lambda: cache.reorder_cache(torch.tensor([0]))):
        with pytest.raises(InvalidInput, match=r"stopped before layer 1 of 2; wanted truncate\(\[6\]\)"):
            call()
    assert [cache.get_seq_length(layer) for layer in range(2)] == [7, 6]
    cache.truncate([6])
    assert decode(model, cache, first, NEW) == eager_tokens(model, prompts, NEW)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_step_that_fails_gives_its_room_back(page_size: int) -> None:
    model = make_model("llama")
    prompts = prompts_of(6, 4)
    cache = make_cache(model, batch=2, page_size=page_size)
    first = prefill(model, cache, prompts)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), cache.step(30), torch.no_grad():
        forward(model, cache, torch.ones(2, 30, dtype=torch.int64))
    hook.remove()
    with pytest.raises(InvalidInput, match="layer_idx: got layers 0 to 0 alone"), cache.step(1):
        cache.update(*states(cache, 2), 0)
    assert cache.lengths == [6, 4] == cache.storage.cache_seqlens.tolist()
    assert decode(model, cache, first, NEW) == eager_tokens(model, prompts, NEW)


def test_positions_and_lengths_are_those_of_the_rows_of_the_step() -> None:
    cache = make_cache(make_model("llama"), batch=4)
    with cache.step([2, 5, 0, 7], q_len=7):
        update(cache, 4, 7)
    assert (cache.rows, cache.get_seq_length(), cache.get_mask_sizes(3, 0)) == ([0, 1, 2, 3], 7, (10, 0))
    assert cache.positions(2).tolist() == [[2, 3], [5, 6], [0, 1], [7, 8]]
    for rows, wanted in ((slice(1, 3), [5, 0]), ([3, 0], [7, 2])):
        with cache.step(1, rows=rows):
            assert cache.positions(1).tolist() == [[length] for length in wanted]
            assert (len(cache.rows), cache.get_seq_length()) == (2, max(wanted))
            update(cache, 2)
            assert cache.get_seq_length() == max(wanted) + 1
        cache.truncate([2, 5, 0, 7])


def test_kernels_of_others_append_where_update_would() -> None:
    model = make_model("llama")
    ours, theirs = make_cache(model, batch=2), make_cache(model, batch=2)
    new = [states(ours, 2, 3) for _ in range(2)]
    with ours.step([3, 1], q_len=3):
        handles = [ours.update(k, v, layer)[0].cache for layer, (k, v) in enumerate(new)]
    with theirs.step([3, 1], q_len=3):
        records = theirs.begin()
    for handle, record in zip(handles, records, strict=True):
        assert (record.new_tokens, record.cache_seqlens.tolist()) == (3, [0, 0])
        assert (handle.new_tokens, handle.cache_seqlens.tolist()) == (3, [0, 0])
    assert ours.storage.cache_seqlens.tolist() == theirs.storage.cache_seqlens.tolist() == [3, 1]
    assert ours.storage.keys[1, 0, :3].equal(new[1][0][0].transpose(0, 1))


def test_views_are_made_once_for_a_loop_of_decoding() -> None:
    cache = make_cache(make_model("llama"), batch=2)
    found = []
    for _ in range(3):
        k, v = states(cache, 2)
        found.append([cache.update(k, v, layer)[0].cache for layer in range(2)])
    assert all(one is other for step in found for one, other in zip(step, found[0], strict=True))


def test_padding_may_go_where_a_row_owns_no_pages() -> None:
    model = make_model("llama")
    prompts = prompts_of(14, 3)
    cache = make_cache(model, batch=2, capacity=32, page_size=8, num_pages=5)
    first = prefill(model, cache, prompts)
    poison_page_zero(cache)
    assert decode(model, cache, first, NEW) == eager_tokens(model, prompts, NEW)


def poison_page_zero(cache: FlashCache) -> None:
    cache.storage.keys[:, 0] = torch.nan
    cache.storage.values[:, 0] = torch.nan


def test_a_reset_cache_takes_another_batch_and_sees_nothing_old() -> None:
    model = make_model("mistral")
    cache = make_cache(model, batch=3, page_size=4)
    decode(model, cache, prefill(model, cache, prompts_of(5, 9, 2)), 3)
    cache.reset()
    poison(cache)
    assert (cache.lengths, cache.batch_size, cache.get_seq_length()) == ([0, 0, 0], 3, 0)
    ids = torch.stack(prompts_of(7))
    with torch.no_grad():
        with_attention(model, "flash_decoding")(ids, past_key_values=cache)
    assert (cache.lengths, cache.batch_size) == ([7, 0, 0], 1)
