"""Models get their cache by the name that they have for it, in all releases."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from flash_decoding.decoder import Decoder
from flash_decoding.transformers.names import cache_argument
from tests.transformers_tools import VOCAB, make_model


def test_a_decoder_calls_models_by_names_that_stay() -> None:
    """The old name is taken for some releases, with a warning for each call."""
    model = make_model("gemma2")
    prompt = torch.randint(3, VOCAB, (9,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        made = Decoder(model, capacity=32).generate([prompt], max_new_tokens=3)
    assert len(made[0]) == 3


def test_a_model_written_for_the_old_name_keeps_it() -> None:
    def forward(self: Any, input_ids: Any, past_key_values: Any = None, **rest: Any) -> None:
        """Of a model whose code is not Transformers' own."""

    assert cache_argument(forward) == "past_key_values"
