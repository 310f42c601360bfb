"""Models under ``torch.compile``: no graph break, one graph for all lengths, eager attention's result."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, StaticCache

from tests.test_transformers_generate import greedy, prompt
from tests.transformers_tools import (
    STEPS,
    Scenario,
    assert_logits,
    assert_same_tokens,
    make_model,
    padding_mask,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INDUCTOR = pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
CASES = [
    pytest.param("llama", "none", "inductor", marks=INDUCTOR),
    pytest.param("llama", "left", "inductor", marks=INDUCTOR),
    ("llama", "left", "aot_eager"),
    ("gemma2", "none", "aot_eager"),
    ("gemma2", "left", "aot_eager"),
]
CAPACITY = 20


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "padding", "backend"), CASES)
def test_decoding_into_a_static_cache_is_one_graph(
    family: str, padding: str, backend: str, device: str
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)

    def read(model: Any, scenario: Scenario, ids: Tensor) -> Tensor:
        """Prefill as it is, then compiled steps; the mask of padding has a column for every slot."""
        mask = padding_mask(scenario)
        real = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        wide = None if mask is None else torch.nn.functional.pad(real, (0, CAPACITY - real.shape[1]), value=1)
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        step, begin, logits = model, 0, []
        for size in scenario.sizes:
            end = begin + size
            piece, at = ids[:, begin:end].clone(), positions[:, begin:end].clone()
            out = step(piece, attention_mask=wide, position_ids=at, past_key_values=cache)
            logits.append(out.logits.clone())
            begin, step = end, torch.compile(model, fullgraph=True, backend=counter)
        return torch.cat(logits, dim=1)[real.bool()]

    assert_logits(make_model(family, device), Scenario(STEPS, "static", padding), read)
    assert counter.frame_count <= 2, (
        "beyond its window, a cache of fixed size takes another path: one graph more"
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_compiles_with_a_static_cache(family: str, device: str) -> None:
    torch._dynamo.reset()
    config: Any = CompileConfig(backend="aot_eager", fullgraph=True)
    config.mode, config._compile_all_devices = None, True

    def compiled(model: Any) -> Tensor:
        return greedy(model, **prompt(model), cache_implementation="static", compile_config=config)

    assert_same_tokens(make_model(family, device), compiled)
