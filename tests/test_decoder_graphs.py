"""Steps of one q_len are one CUDA graph, whatever the lengths, and generation never waits for the device."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_decoding.decoder import Decoder
from flash_decoding.decoder.graphs import Graphs
from tests.decoder_tools import GREEDY, Reading, assert_logits, make_decoder, texts_of
from tests.transformers_tools import make_model

pytestmark = pytest.mark.gpu


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The q_len of each capture, as they come."""
    seen: list[int] = []
    capture = Graphs._capture

    def noted(graphs: Graphs, tokens: Tensor) -> Any:
        seen.append(tokens.shape[1])
        return capture(graphs, tokens)

    monkeypatch.setattr(Graphs, "_capture", noted)
    return seen


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_one_capture_for_each_q_len(family: str, page_size: int, captured: list[int]) -> None:
    model = make_model(family, "cuda")
    reading = Reading(make_decoder(model, page_size=page_size), texts_of(40, 50, 64, device="cuda"))
    reading.prefill(2, 9, 1)
    for _ in range(6):
        reading.step(1, 1, 1)
        reading.step(3, 2, 0)
    reading.decoder.truncate([3, 1, 2])
    for _ in range(6):
        reading.step(1, 0, 1)
        reading.step(0, 3, 3)
    reading.decoder.reset()
    reading.prefill(30, 1, 60)
    reading.step(1, 1, 1)
    reading.step(3, 3, 3)
    assert captured == [1, 3]
    assert_logits(model, reading.texts, reading.found)


def test_graphs_and_none_give_the_same_bits() -> None:
    model = make_model("llama", "cuda", torch.bfloat16)
    texts = texts_of(20, 21, 22, device="cuda")
    found = []
    for graphs in (True, False):
        reading = Reading(make_decoder(model, graphs=graphs), texts)
        reading.prefill(5, 6, 7)
        for _ in range(5):
            reading.step(1, 1, 1)
            reading.step(2, 2, 2)
        found.append(torch.stack([x for row in reading.found for x in row.values()]))
    assert torch.equal(*found)


def test_drafts_need_two_graphs_of_the_model_and_two_of_the_assistant(captured: list[int]) -> None:
    decoder = make_decoder(make_model("llama", "cuda"))
    assistant = make_decoder(make_model("llama", "cuda"))
    texts = texts_of(9, 5, 7)
    for _ in range(3):
        decoder.generate(texts, assistant=assistant, max_new_tokens=30, num_assistant_tokens=3, **GREEDY)
    assert {2, 4} <= set(captured) <= {1, 2, 4}
    assert len(captured) <= 4


@pytest.mark.parametrize("call", [{}, {"do_sample": True, "temperature": 0.8, "top_k": 20}])
def test_generation_waits_for_nothing_but_the_tokens(call: dict[str, Any]) -> None:
    """Once the graph stands: waiting for an event is what PyTorch's debug mode does not count."""
    decoder = Decoder(make_model("llama", "cuda"), batch=2, capacity=64)
    steps = 0

    def watched(new: list[list[int]]) -> None:
        nonlocal steps
        steps += 1
        if steps in (5, 25):
            torch.cuda.set_sync_debug_mode("error" if steps == 5 else "default")

    try:
        decoder.generate(texts_of(9, 5), on_tokens=watched, max_new_tokens=30, **GREEDY | call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == 30


def test_the_collector_waits_for_a_capture() -> None:
    """It may come in the middle of any Python, and a graph that it ended there would end the capture."""
    collects: list[bool] = []

    def forward(tokens: Tensor) -> Tensor:
        collects.append(gc.isenabled())
        return tokens + 1

    graphs, tokens = Graphs(forward), torch.zeros(1, 1, dtype=torch.long, device="cuda")
    for _ in range(3):
        graphs.run(tokens)
    assert collects == [True, False], "run once, captured once"
    assert gc.isenabled()
