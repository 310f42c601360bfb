"""Our mask is a few numbers for each sequence, and says what Transformers' own matrix says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedConfig, masking_utils

import flash_decoding.transformers
from flash_decoding.errors import InvalidInput, Unsupported
from flash_decoding.transformers import mask as mask_file
from flash_decoding.transformers.bounds import Bounds, pack, unpack
from flash_decoding.transformers.mask import attention_mask

WINDOW = 4


def whole(bounds: Bounds | None, call: dict[str, Any], window: int | None) -> Tensor:
    """(batch, q_length, kv_length) bool: what attention sees with these bounds and the layer's window."""
    batch, q_len, slots = call["batch_size"], call["q_length"], torch.arange(call["kv_length"])
    starts, lengths = torch.zeros(batch), torch.full((batch,), call["kv_length"])
    causal, exists = call["mask_function"] is not masking_utils.bidirectional_mask_function, slots >= 0
    if bounds is not None:
        starts, lengths, causal = bounds.starts, bounds.lengths, bounds.causal
        exists = exists if bounds.key_mask is None else bounds.key_mask[:, None, : len(slots)]
    ahead = slots - (lengths[:, None, None] - q_len + torch.arange(q_len)[:, None])
    seen = exists & (slots >= starts[:, None, None]) & (slots < lengths[:, None, None])
    seen = seen & (ahead <= 0) if causal else seen
    return (seen if window is None else seen & (ahead > -window)).expand(batch, q_len, -1)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """What Transformers passes for growing, fixed and sliding caches, with and without padding."""
    batch, q_len, past = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(0, 7))
    kind = draw(st.sampled_from(["growing", "fixed", "sliding", "bidirectional"]))
    call: dict[str, Any] = {"batch_size": batch, "q_length": q_len, "q_offset": past, "kv_offset": 0}
    call |= {"kv_length": past + q_len, "mask_function": masking_utils.causal_mask_function, "device": "cpu"}
    if kind == "fixed":
        call |= {"kv_length": past + q_len + draw(st.integers(0, 4)), "q_offset": torch.tensor(past)}
    elif kind == "bidirectional":
        call |= {"mask_function": masking_utils.bidirectional_mask_function, "q_offset": 0}
    elif kind == "sliding":
        gone = max(past - WINDOW + 1, 0)
        call |= {"kv_length": past + q_len - gone, "kv_offset": gone, "local_size": WINDOW}
        call["mask_function"] = masking_utils.sliding_window_causal_mask_function(WINDOW)
    if draw(st.booleans()):
        columns = past + q_len + draw(st.integers(-1, 3))
        rows = st.lists(st.booleans(), min_size=columns, max_size=columns)
        call["attention_mask"] = torch.tensor([draw(rows) for _ in range(batch)], dtype=torch.bool)
    return call


@pytest.mark.parametrize("tracing", [False, True], ids=["looking", "tracing"])
@given(call=calls())
def test_bounds_say_what_the_matrix_says(tracing: bool, call: dict[str, Any]) -> None:
    window = call.get("local_size")
    config = PreTrainedConfig()
    config.sliding_window = window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_file, "is_tracing", lambda _: tracing)
        patch.setattr(mask_file, "is_torchdynamo_compiling", lambda: tracing)
        got = attention_mask(**call, config=config)
    bounds = None if got is None else unpack(got, call["kv_length"])
    wanted = masking_utils.sdpa_mask(**call, allow_is_causal_skip=False)
    assert wanted is not None
    assert torch.equal(whole(bounds, call, window), wanted[:, 0])
    if bounds is None:
        assert torch.equal(whole(bounds, call, None), wanted[:, 0]), "a layer without a window would see more"
    if bounds is not None and bounds.windowed and "attention_mask" not in call:
        assert not torch.equal(whole(bounds, call, None), wanted[:, 0]), "a window that hides nothing"


def call_of(**changes: Any) -> dict[str, Any]:
    return {"batch_size": 2, "q_length": 3, "kv_length": 8, "q_offset": 5, "device": "cpu"} | changes


def test_nothing_is_made_where_nothing_is_hidden() -> None:
    assert attention_mask(**call_of()) is None
    assert attention_mask(**call_of(attention_mask=torch.ones(2, 8, dtype=torch.bool))) is None


def test_left_padding_needs_no_columns() -> None:
    made = attention_mask(**call_of(attention_mask=torch.arange(8) >= torch.tensor([[2], [0]])))
    assert made is not None
    assert made.shape == (2, 1, 1, 2)
    bounds = unpack(made, 8)
    assert bounds.starts.tolist() == [2, 0]
    assert bounds.lengths.tolist() == [8, 8]
    assert bounds.key_mask is None


def test_nobody_looks_while_a_graph_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(_: Tensor) -> None:
        raise AssertionError("contents were read on the host")

    monkeypatch.setattr(mask_file, "is_tracing", lambda _: True)
    monkeypatch.setattr(Tensor, "tolist", look)
    monkeypatch.setattr(Tensor, "item", look)
    monkeypatch.setattr(Tensor, "__bool__", look)
    made = attention_mask(**call_of(attention_mask=torch.ones(2, 8, dtype=torch.bool)))
    assert made is not None
    assert unpack(made, 8).key_mask is not None


@pytest.mark.parametrize("columns", [0, 1, 4, 7, 8])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_bounds_come_back_as_they_were(columns: int, causal: bool, windowed: bool, packed: bool) -> None:
    causal = causal or packed
    starts, lengths = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([5, 8], dtype=torch.int32)
    key_mask = torch.rand(2, columns) < 0.5 if columns else None
    made = pack(Bounds(starts, lengths, key_mask, causal, windowed, packed))
    assert made.dtype == torch.int32
    assert made.ndim == 4
    back = unpack(made, columns)
    assert torch.equal(back.starts, starts)
    assert torch.equal(back.lengths, lengths)
    assert (back.causal, back.windowed, back.packed) == (causal, windowed, packed)
    if key_mask is None:
        assert back.key_mask is None
    else:
        assert back.key_mask is not None
        assert torch.equal(back.key_mask, key_mask)


USERS = masking_utils.padding_mask_function(torch.ones(2, 8, dtype=torch.bool))
OTHERS = {
    "chunked_overlay": masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    "blockwise_overlay": masking_utils.or_masks(
        masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.zeros(2, 8))
    ),
    "packed_sequence_mask_function": masking_utils.and_masks(
        masking_utils.bidirectional_mask_function,
        masking_utils.packed_sequence_mask_function(torch.zeros(2, 8)),
    ),
    "padding_mask_function": masking_utils.and_masks(masking_utils.causal_mask_function, USERS),
    "or_masks": masking_utils.or_masks(masking_utils.causal_mask_function, USERS),
    "sliding_window_bidirectional_overlay": masking_utils.sliding_window_bidirectional_mask_function(4),
    "function of a user": lambda batch, head, query, key: key <= query,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_patterns_are_refused_by_name(name: str) -> None:
    wanted = "test_transformers_mask|<lambda>" if name == "function of a user" else name
    with pytest.raises(Unsupported, match=wanted):
        attention_mask(**call_of(mask_function=OTHERS[name]))


TRACED: dict[str, dict[str, Any]] = {
    "chunked_overlay": {"local_size": 4, "attention_chunk_size": 4},
    "blockwise_overlay": {"allow_is_causal_skip": False},
    "packed_sequence_mask_function": {"allow_is_causal_skip": False},
    "padding_mask_function": {"use_vmap": True, "allow_is_causal_skip": False, "local_size": 6},
    "or_masks": {"use_vmap": True, "allow_is_causal_skip": False, "local_size": 6},
    "sliding_window_bidirectional_overlay": {"local_size": 6, "allow_is_causal_skip": False},
}


@pytest.mark.parametrize("name", TRACED)
def test_other_patterns_are_refused_while_tracing_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments that Transformers passes along with each, for a model with a window of 6."""
    monkeypatch.setattr(mask_file, "is_tracing", lambda _: True)
    monkeypatch.setattr(mask_file, "is_torchdynamo_compiling", lambda: True)
    config = PreTrainedConfig()
    facts = dict(TRACED[name])
    config.sliding_window, config.attention_chunk_size = 6, facts.pop("attention_chunk_size", None)
    with pytest.raises(Unsupported, match="mask"):
        attention_mask(**call_of(mask_function=OTHERS[name], config=config), **facts)


@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("capturing", [False, True])
def test_packed_sequences_are_told_apart(
    window: int | None, capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Transformers asks for them by positions; while a graph is captured, functions can be looked into."""
    flash_decoding.transformers.register()
    monkeypatch.setattr(mask_file, "is_tracing", lambda _: capturing)
    config = PreTrainedConfig()
    config.sliding_window, config._attn_implementation = window, "flash_decoding"
    kinds = [masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask]
    asked: Any = {"attention_mask": None, "past_key_values": None}
    asked["position_ids"] = torch.tensor([[0, 1, 0, 1, 2]])
    made = kinds[window is not None](config, torch.zeros(1, 5, 8), **asked)
    assert isinstance(made, Tensor)
    bounds = unpack(made, 5)
    assert (bounds.packed, bounds.causal, bounds.windowed) == (True, True, window == 2)
    assert bounds.key_mask is None


def test_masks_of_other_shapes_are_refused() -> None:
    with pytest.raises(InvalidInput, match="attention_mask"):
        attention_mask(**call_of(attention_mask=torch.ones(3, 8, dtype=torch.bool)))
    with pytest.raises(InvalidInput, match="attention_mask"):
        attention_mask(**call_of(attention_mask=torch.ones(2, 3, 8, dtype=torch.bool)))
    with pytest.raises(InvalidInput, match="kv_length"):
        attention_mask(**call_of(kv_length=7))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_a_mask_made_by_hand_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidInput, match="attention_mask"):
        unpack(torch.ones(2, 1, 3, 8, dtype=dtype), 8)
    with pytest.raises(InvalidInput, match="attention_mask"):
        unpack(torch.ones(2, 1, 3, 8, dtype=torch.int32), 8)
