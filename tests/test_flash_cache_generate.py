"""``model.generate`` with a FlashCache gives the tokens of eager attention, whatever is asked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_decoding.errors import CacheFull, Unsupported
from flash_decoding.transformers import FlashCache
from tests.flash_cache_tools import FAMILIES, GREEDY, PAGE_SIZES, make_cache, poison
from tests.transformers_tools import VOCAB, make_model, with_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NEW = 14

SAMPLED = GREEDY | {"do_sample": True, "temperature": 0.9, "top_k": 20}

MODES: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "sampling": SAMPLED,
    "several samples": SAMPLED | {"num_return_sequences": 3},
    "beams": GREEDY | {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": SAMPLED | {"num_beams": 3},
    "prefill in chunks": GREEDY | {"prefill_chunk_size": 4},
}
DRAFTS: list[tuple[str, dict[str, Any]]] = [
    ("mistral", GREEDY | {"prompt_lookup_num_tokens": 3}),
    ("gemma2", SAMPLED | {"prompt_lookup_num_tokens": 3}),
    ("llama", GREEDY | {"assistant_model": True}),
]


def generate(model: Any, attention: str, ids: Tensor, cache: FlashCache | None, **call: Any) -> Tensor:
    torch.manual_seed(3)
    call = {"max_new_tokens": NEW} | call
    tokens: Tensor = with_attention(model, attention).generate(ids, past_key_values=cache, **call)
    return tokens


def both(model: Any, cache: FlashCache, ids: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    got = generate(model, "flash_decoding", ids, cache, **call)
    return got, generate(model, "eager", ids, None, **call)


def random_ids(model: Any, batch: int, tokens: int = 11) -> Tensor:
    return torch.randint(3, VOCAB, (batch, tokens), device=model.device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_generate(family: str, page_size: int, device: str) -> None:
    model = make_model(family, device)
    cache = make_cache(model, page_size=page_size)
    ids = random_ids(model, 2)
    for mode, call in MODES.items():
        cache.reset()
        poison(cache)
        got, wanted = both(model, cache, ids, **call)
        assert got.tolist() == wanted.tolist(), mode


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left(family: str, page_size: int, device: str) -> None:
    model = make_model(family, device)
    cache = make_cache(model, page_size=page_size)
    mask = torch.ones(3, 11, dtype=torch.int64, device=model.device)
    mask[1, :4], mask[2, :9] = 0, 0
    ids = random_ids(model, 3) * mask
    for call in (MODES["greedy"], MODES["prefill in chunks"], GREEDY | {"num_beams": 2}):
        cache.reset()
        got, wanted = both(model, cache, ids, attention_mask=mask, **call)
        assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(("family", "call"), DRAFTS, ids=["lookup", "sampled lookup", "assistant"])
def test_drafts_are_verified_and_rolled_back(
    family: str, call: dict[str, Any], page_size: int, device: str
) -> None:
    model = make_model(family, device)
    if "assistant_model" in call:
        assistant = copy.deepcopy(with_attention(model, "eager"))
        with torch.no_grad():  # close enough that drafts are accepted, far enough that some are not
            assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight), alpha=0.05)
        call = call | {"assistant_model": assistant}
    piece = random_ids(model, 1, 5)
    cache = make_cache(model, batch=1, page_size=page_size)
    got, wanted = both(model, cache, piece.repeat(1, 4), **call)
    assert got.tolist() == wanted.tolist()
    assert cache.lengths == [got.shape[1] - 1]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("full_ids", [True, False])
def test_a_filled_cache_goes_on(page_size: int, full_ids: bool) -> None:
    model = make_model("gemma2")
    cache = make_cache(model, page_size=page_size)
    first, wanted = both(model, cache, random_ids(model, 2), **GREEDY)
    longer = torch.cat((first, random_ids(model, 2, 5)), dim=1)
    mask = torch.ones_like(longer)
    new = longer if full_ids else longer[:, cache.get_seq_length() :]
    got = generate(model, "flash_decoding", new, cache, attention_mask=mask, **GREEDY)
    wanted = generate(model, "eager", longer, None, attention_mask=mask, **GREEDY)
    assert got[:, -NEW:].tolist() == wanted[:, -NEW:].tolist()
    assert cache.lengths[:2] == [longer.shape[1] + NEW - 1] * 2


def test_what_generate_returns_is_the_cache_and_goes_on_too() -> None:
    model = make_model("llama")
    ids = random_ids(model, 1)
    cache = make_cache(model, batch=1)
    found = with_attention(model, "flash_decoding").generate(
        ids, past_key_values=cache, max_new_tokens=5, return_dict_in_generate=True, **GREEDY
    )
    assert found.past_key_values is cache
    again = generate(model, "flash_decoding", found.sequences, cache, **GREEDY)
    assert (
        again.tolist() == generate(model, "eager", ids, None, **GREEDY | {"max_new_tokens": NEW + 5}).tolist()
    )


def test_a_copied_prompt_serves_many() -> None:
    model = make_model("llama")
    ids = random_ids(model, 1)
    prompt = make_cache(model, batch=1, page_size=16)
    with torch.no_grad():
        with_attention(model, "flash_decoding")(ids[:, :-1], past_key_values=prompt)
    for last in (5, 6):
        ids[0, -1] = last
        got, wanted = both(model, copy.deepcopy(prompt), ids, **GREEDY)
        assert got.tolist() == wanted.tolist()
    assert prompt.lengths == [10]


@pytest.mark.parametrize("repeats", [1, 3])
def test_rows_are_repeated_and_selected(repeats: int) -> None:
    model = make_model("mistral")
    ids = random_ids(model, 2)
    cache = make_cache(model, page_size=16)
    with torch.no_grad():
        with_attention(model, "flash_decoding")(ids[:, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(repeats)
    assert cache.batch_size == 2 * repeats
    wide = ids.repeat_interleave(repeats, dim=0)
    kept = torch.tensor([2 * repeats - 1, 0])
    got, wanted = both(model, cache, wide, **GREEDY)
    assert got.tolist() == wanted.tolist()
    cache.batch_select_indices(kept)
    assert (cache.batch_size, cache.lengths) == (2, [ids.shape[1] + NEW - 1] * 2 + [0] * 4)
    got = generate(model, "flash_decoding", got[kept], cache, **GREEDY)
    assert got.tolist() == generate(model, "eager", wanted[kept], None, **GREEDY).tolist()


@pytest.mark.parametrize("sizes", [{"capacity": 20}, {"capacity": 64, "page_size": 4, "num_pages": 9}])
def test_a_full_cache_says_so_and_can_be_rolled_back(sizes: dict[str, int]) -> None:
    model = make_model("llama")
    ids = random_ids(model, 2)
    cache = make_cache(model, batch=2, **sizes)
    with pytest.raises(CacheFull) as caught:
        generate(model, "flash_decoding", ids, cache, **GREEDY)
    assert caught.value.free == 0 if "page_size" not in sizes else caught.value.free < 2
    filled = 20 if "page_size" not in sizes else 16
    assert cache.lengths == [filled] * 2 == cache.storage.cache_seqlens.tolist()
    cache.crop(ids.shape[1] - 1)
    got, wanted = both(model, cache, ids, **GREEDY | {"max_new_tokens": 5})
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_another_attention_is_told_what_would_do(attention: str) -> None:
    model = make_model("llama")
    cache = make_cache(model)
    with pytest.raises(Unsupported, match="set_attn_implementation"):
        generate(model, attention, random_ids(model, 1), cache, **GREEDY)
