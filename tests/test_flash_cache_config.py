"""What FlashCache reads from configurations, which models it refuses, and what Transformers finds in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BambaConfig,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
    T5Config,
)

from flash_decoding import ContiguousCache, PagedCache
from flash_decoding.errors import InvalidInput, Unsupported
from flash_decoding.transformers import FlashCache

LLAMA = LlamaConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, vocab_size=32
)

REFUSED: list[tuple[str, Callable[[], PreTrainedConfig]]] = [
    ("num_kv_shared_layers", lambda: Gemma3nTextConfig(num_hidden_layers=20, num_kv_shared_layers=5)),
    ("linear_attention", lambda: Qwen3NextConfig(num_hidden_layers=4)),
    ("linear_attention", lambda: BambaConfig(num_hidden_layers=4, attn_layer_indices=[1])),
    ("num_attention_heads", MambaConfig),
    ("is_encoder_decoder", T5Config),
    ("kv_lora_rank", DeepseekV3Config),
]


@pytest.mark.parametrize(("name", "make"), REFUSED)
def test_models_whose_layers_keep_other_things_are_refused_by_name(
    name: str, make: Callable[[], PreTrainedConfig]
) -> None:
    with pytest.raises(Unsupported, match=name):
        FlashCache(make(), batch=1, capacity=8)


def test_sizes_come_from_the_configuration() -> None:
    cache = FlashCache(LLAMA, batch=2, capacity=10)
    assert isinstance(cache.storage, ContiguousCache)
    assert cache.storage.keys.shape == cache.storage.values.shape == (3, 2, 10, 2, 8)
    assert (len(cache), cache.batch, cache.capacity, cache.page_size) == (3, 2, 10, 0)


def test_pages_are_enough_for_all_rows() -> None:
    cache = FlashCache(LLAMA, batch=3, capacity=10, page_size=4)
    assert isinstance(cache.storage, PagedCache)
    assert (cache.capacity, cache.page_size, cache.storage.free_pages) == (12, 4, 9)
    smaller = FlashCache(LLAMA, batch=3, capacity=10, page_size=4, num_pages=5)
    assert isinstance(smaller.storage, PagedCache)
    assert (smaller.capacity, smaller.storage.free_pages) == (12, 5)


def test_models_without_grouped_heads_and_with_nested_configurations() -> None:
    plain = FlashCache(GPT2Config(n_embd=32, n_layer=2, n_head=4), batch=1, capacity=4)
    assert plain.storage.keys.shape == (2, 1, 4, 4, 8)
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
    nested = FlashCache(Gemma3Config(text_config=text), batch=1, capacity=4)
    assert nested.storage.keys.shape == (2, 1, 4, 1, 16)


@pytest.mark.parametrize(
    ("given", "in_config", "wanted"),
    [
        (None, None, torch.float32),
        (None, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16),
    ],
)
def test_the_dtype_is_that_of_the_model(given: Any, in_config: Any, wanted: torch.dtype) -> None:
    config = LlamaConfig(**LLAMA.to_dict() | {"dtype": in_config})
    assert FlashCache(config, batch=1, capacity=4, dtype=given).storage.keys.dtype == wanted


@pytest.mark.parametrize("pages", [{}, {"page_size": 4}, {"page_size": 4, "num_pages": 3}])
def test_memory_is_known_before_it_is_taken(pages: dict[str, Any]) -> None:
    cache = FlashCache(LLAMA, batch=2, capacity=10, dtype=torch.bfloat16, **pages)
    assert FlashCache.bytes_for(LLAMA, batch=2, capacity=10, dtype=torch.bfloat16, **pages) == cache.memory()
    if not pages:
        assert (
            cache.memory() == 2 * 3 * 2 * 10 * 2 * 8 * 2
        )  # k and v, layers, rows, slots, heads, elements, bytes


@pytest.mark.parametrize(
    ("argument", "sizes"),
    [
        ("batch", {"batch": 0}),
        ("capacity", {"capacity": 0}),
        ("page_size", {"page_size": -1}),
        ("num_pages", {"num_pages": 4}),
        ("num_pages", {"page_size": 4, "num_pages": 0}),
    ],
)
def test_sizes_that_no_cache_has(argument: str, sizes: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        FlashCache(LLAMA, **{"batch": 1, "capacity": 8} | sizes)
    assert caught.value.argument == argument
    with pytest.raises(InvalidInput):
        FlashCache.bytes_for(LLAMA, **{"batch": 1, "capacity": 8} | sizes)


def test_what_transformers_finds() -> None:
    config = MistralConfig(**LLAMA.to_dict() | {"sliding_window": 4, "model_type": "mistral"})
    cache = FlashCache(config, batch=2, capacity=12)
    assert cache.is_initialized
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.is_sliding == cache.is_linear == [False] * 3
    assert (cache.get_max_length(), cache.get_max_length(1), cache.batch_size) == (12, 12, 2)
    assert (cache.get_query_offset(), cache.get_mask_sizes(5, 2)) == (0, (5, 0))
    cache.activate_past_recording()  # type: ignore[no-untyped-call]
    cache.early_initialization(2, 2, [8, 8, 8], torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 2, 8, torch.float32, "cpu"),
        (2, 4, 8, torch.float32, "cpu"),
        (2, 2, [8, 8, 16], torch.float32, "cpu"),
        (2, 2, 8, torch.float16, "cpu"),
        (2, 2, 8, torch.float32, "meta"),
    ],
)
def test_early_initialization_with_other_sizes_is_refused(sizes: Any) -> None:
    with pytest.raises(InvalidInput):
        FlashCache(LLAMA, batch=2, capacity=12).early_initialization(*sizes)


def test_layers_change_together_or_not_at_all() -> None:
    cache = FlashCache(LLAMA, batch=1, capacity=4)
    layer: Any = cache.layers[1]
    for name in ("reset", "crop", "reorder_cache", "offload", "prefetch", "batch_select_indices"):
        with pytest.raises(Unsupported, match="ask the cache itself"):
            getattr(layer, name)()
    with pytest.raises(Unsupported, match="offloading"):
        cache.offload(0)
    with pytest.raises(Unsupported, match="set_attn_implementation"):
        layer.keys.shape  # noqa: B018 - reading it is the test
