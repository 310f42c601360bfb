"""Logits of small models of every family are those of eager attention, whatever way the tokens come in."""

from __future__ import annotations

import pytest
import torch

from tests.transformers_tools import FAMILIES, SCENARIOS, STEPS, Scenario, assert_logits, make_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_float32(family: str, device: str) -> None:
    model = make_model(family, device)
    for scenario in SCENARIOS:
        assert_logits(model, scenario)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_bfloat16(family: str, device: str) -> None:
    model = make_model(family, device, torch.bfloat16)
    for padding in ("none", "left", "right"):
        assert_logits(model, Scenario(STEPS, "dynamic", padding))
