"""What a Decoder cannot do it refuses by name, before anything is written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from flash_decoding.decoder import Decoder, blocks
from flash_decoding.decoder.request import REFUSED
from flash_decoding.errors import CacheFull, InvalidInput, Unsupported
from tests.decoder_tools import DEVICES, FUSED, GREEDY, UNFUSED, make_decoder, texts_of
from tests.transformers_tools import make_model

LENGTHS = (11, 4, 7)


@pytest.mark.parametrize(
    ("texts", "call", "error", "match"),
    [
        (texts_of(60, 1, 1), {"max_new_tokens": 6}, CacheFull, "row 0"),
        (texts_of(5, 5), {"max_new_tokens": 5}, InvalidInput, "3, one a row"),
        (texts_of(5, 5, 0), {}, InvalidInput, "prompts"),
        ([text.float() for text in texts_of(5, 5, 5)], {}, InvalidInput, "prompts"),
        (texts_of(5, 5, 5), {"attention_mask": torch.ones(3, 5)}, InvalidInput, "attention_mask"),
        (torch.ones(3, 5, 1, dtype=torch.int64), {}, InvalidInput, "prompts"),
        (
            torch.ones(3, 4, dtype=torch.int64),
            {"attention_mask": torch.ones(3, 5)},
            InvalidInput,
            "as prompts",
        ),
        (
            torch.full((3, 4), 5),
            {"attention_mask": torch.tensor([[1, 0, 1, 1]] * 3)},
            InvalidInput,
            "side by side",
        ),
        (
            torch.full((3, 4), 5),
            {"attention_mask": torch.tensor([[1] * 4, [0] * 4, [1] * 4])},
            InvalidInput,
            "row 1",
        ),
        (texts_of(5, 5, 5), {"max_new_token": 5}, InvalidInput, "max_new_token"),
        (texts_of(5, 5, 5), {"position_ids": torch.zeros(3, 5)}, InvalidInput, "position_ids"),
        (texts_of(5, 5, 5), {"assistant_confidence_threshold": 0.3}, Unsupported, "num_assistant_tokens"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    texts: Any, call: dict[str, Any], error: type[Exception], match: str
) -> None:
    decoder = make_decoder(make_model("llama"))
    decoder.prefill(texts_of(4, 5, 6))
    with pytest.raises(error, match=match):
        decoder.generate(texts, **GREEDY | call)
    assert decoder.lengths == [4, 5, 6]


STRANGE: dict[str, Any] = {
    "num_beams": 2,
    "num_beam_groups": 2,
    "num_return_sequences": 2,
    "diversity_penalty": 0.5,
    "penalty_alpha": 0.6,
    "guidance_scale": 2.0,
    "use_cache": False,
    "num_assistant_tokens_schedule": "heuristic",
    "cache_implementation": "static",
    "prefill_chunk_size": 4,
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_not_honoured_are_refused_by_name(name: str) -> None:
    """As an option, in a config, and as the model's own."""
    model = make_model("llama")
    decoder = make_decoder(model)
    texts = texts_of(*LENGTHS)
    value = STRANGE.get(name, True)
    with pytest.raises(Unsupported, match=name):
        decoder.generate(texts, **GREEDY | {name: value})
    config = GenerationConfig()  # type: ignore[no-untyped-call]
    setattr(config, name, value)
    with pytest.raises(Unsupported, match=name):
        decoder.generate(texts, generation_config=config)
    assert decoder.lengths == [0, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [0, 8])
def test_a_full_row_is_an_error_before_anything_is_written(page_size: int, device: str) -> None:
    decoder = make_decoder(make_model("llama", device), capacity=16, page_size=page_size)
    token = torch.full((3, 1), 5, device=device)
    decoder.prefill(texts_of(14, 9, 3))
    decoder.step(token)
    decoder.step(token)
    storage = decoder.cache.storage
    before = [x.nan_to_num(7.0).clone() for x in (storage.keys, storage.values)]
    calls: list[Any] = [
        lambda: decoder.step(token),
        lambda: decoder.step(token.expand(3, 7), counts=[0, 6, 1]),
        lambda: decoder.prefill(texts_of(1, 1, 1)),
        lambda: decoder.generate(texts_of(10, 1, 1), max_new_tokens=8),
    ]
    for call in calls:
        with pytest.raises(CacheFull):
            call()
    assert decoder.lengths == [16, 11, 5] == storage.cache_seqlens.tolist()
    for now, then in zip((storage.keys, storage.values), before, strict=True):
        assert torch.equal(now.nan_to_num(7.0), then)
    decoder.step(token, counts=[0, 1, 1])
    assert decoder.lengths == [16, 12, 6]


def refused_prompts() -> list[Any]:
    return [texts_of(3, 3), texts_of(3, 3, 0), [torch.ones(1, 3)] * 3]


def test_shapes_that_do_not_fit() -> None:
    decoder = make_decoder(make_model("llama"))
    for prompts in refused_prompts():
        with pytest.raises(InvalidInput, match="prompts"):
            decoder.prefill(prompts)
    for shape in ((2, 1), (3,), (3, 0), (3, 1, 1)):
        with pytest.raises(InvalidInput, match="tokens"):
            decoder.step(torch.ones(shape, dtype=torch.int64))
    one = torch.ones(3, 1, dtype=torch.int64)
    for counts in ([1, 1], [1, 1, 2], [1, 1, -1]):
        with pytest.raises(InvalidInput):
            decoder.step(one, counts=counts)
    with pytest.raises(InvalidInput, match="meta"):
        decoder.step(one.to("meta"))
    with pytest.raises(InvalidInput, match="lengths"):
        decoder.truncate([1, 0, 0])
    assert decoder.lengths == [0, 0, 0]
    with pytest.raises(InvalidInput, match="prefill_chunk"):
        make_decoder(decoder.model, prefill_chunk=0)
    with pytest.raises(Unsupported, match="CUDA graphs need a GPU"):
        make_decoder(make_model("llama"), graphs=True)


class Adapted(nn.Linear):
    """As libraries of adapters have it: a linear layer that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def adapted(model: Any) -> None:
    layer = model.model.layers[1].self_attn
    layer.v_proj.__class__ = Adapted


def reactivated(model: Any) -> None:
    model.config.hidden_act = "relu"


def rerotated(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def sliced(model: Any) -> None:
    model.config.pretraining_tp = 2


def mixed(model: Any) -> None:
    model.lm_head.to(torch.float64)


def transposed(model: Any) -> None:
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (mixed, "contiguous"),
        (transposed, "contiguous"),
        (adapted, "quantised, wrapped or adapted"),
        (reactivated, "activation"),
        (rerotated, "rotary angles"),
        (sliced, "pretraining_tp"),
    ],
)
def test_models_that_are_almost_made_of_blocks_are_not_taken_for_it(change: Any, reason: str) -> None:
    model = make_model("llama")
    assert blocks.why_not(model) == ()
    change(model)
    (found,) = blocks.why_not(model)
    assert reason in found
    assert not make_decoder(copy.deepcopy(model)).is_fused
    with pytest.raises(Unsupported, match="as blocks") as caught:
        make_decoder(model, fused=True)
    assert caught.value.reasons == (found,)


def test_an_adapted_layer_takes_part() -> None:
    """The model's own forward runs, so what the layer does more is done."""
    model, changed = make_model("llama"), make_model("llama")
    adapted(changed)
    one, other = (make_decoder(x).prefill(texts_of(5, 5, 5)) for x in (model, changed))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("family", UNFUSED)
def test_other_families_say_their_type(family: str) -> None:
    model = make_model(family)
    assert any(model.config.model_type in reason for reason in blocks.why_not(model))
    with pytest.raises(Unsupported, match="as blocks"):
        Decoder(model, capacity=8, attention=lambda queries, cache, options: queries.q)


def test_the_families_of_the_tests_are_those_of_the_code() -> None:
    assert {make_model(family).config.model_type for family in FUSED} == blocks.FAMILIES
