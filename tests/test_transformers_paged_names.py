"""Continuous batching: the names that Transformers' engine takes, and its check for the decode fast path."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, ContinuousBatchingConfig
from transformers.generation.continuous_batching import initialization

import flash_decoding.transformers
from flash_decoding import Unsupported
from flash_decoding.transformers import paged, registration
from tests.transformers_tools import make_model


def test_outside_of_continuous_batching_its_name_is_refused() -> None:
    """By us where Transformers has such names, and by Transformers where it has none."""
    model = make_model("llama")
    if paged.HAS_PREFIX:
        model.set_attn_implementation(paged.NAME)
        with pytest.raises(Unsupported, match="let generate_batch add the rest"):
            model(torch.ones(1, 3, dtype=torch.int64))
    else:
        with pytest.raises(ValueError, match=r'"paged\|flash_decoding"` is not supported'):
            model.set_attn_implementation("paged|flash_decoding")


def test_a_cache_alone_is_no_batch() -> None:
    """Models before 5.24 do not know an argument of that name, and hand it to attention."""
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(Unsupported, match="past_key_values"):
        registration.either(nn.Module(), x, x, x, None, cache=object())


def test_installing_twice_changes_nothing() -> None:
    flash_decoding.transformers.register()
    before = initialization.ensure_decode_fast_path_is_available
    paged.install()
    assert initialization.ensure_decode_fast_path_is_available is before
    registered = AttentionInterface()  # type: ignore[no-untyped-call]
    assert registered["flash_decoding"] is registration.either
    assert registered[paged.NAME] is (paged.attention if paged.HAS_PREFIX else registration.either)


@pytest.mark.parametrize("has_cuda", [False, True])
@pytest.mark.parametrize("name", ["paged|sdpa", "paged|eager", "paged|some/flash", "paged|flash_attention_2"])
def test_other_names_find_the_check_as_it_was(
    name: str, has_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a package of flash-attn had no block tables: the fast path is closed, by Transformers itself."""
    flash_decoding.transformers.register()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    package = "lazy_import_paged_flash_attention"
    nothing: tuple[object, ...] = (None, None)
    if not hasattr(initialization, package):
        package, nothing = "lazy_import_flash_attention", ((None, None, None), None)
    monkeypatch.setattr(initialization, package, lambda name: nothing)
    config: Any = SimpleNamespace(_attn_implementation=name, num_hidden_layers=2)
    hooked, plain = (ContinuousBatchingConfig(max_blocks_per_request=4) for _ in range(2))
    initialization.ensure_decode_fast_path_is_available(config, hooked, False)
    initialization.ensure_decode_fast_path_is_available.__wrapped__(config, plain, False)  # type: ignore[attr-defined]  # the original
    assert hooked == plain
    assert hooked.max_blocks_per_request == 0


def test_our_name_keeps_the_fast_path_on_any_device() -> None:
    flash_decoding.transformers.register()
    ours: Any = SimpleNamespace(_attn_implementation=paged.NAME)
    engine = ContinuousBatchingConfig(max_blocks_per_request=4)
    initialization.ensure_decode_fast_path_is_available(ours, engine, False)
    assert engine.max_blocks_per_request == 4
