"""Registration, what attention makes of a layer's arguments, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PhimoeConfig,
    PreTrainedModel,
)

import flash_decoding.transformers
from flash_decoding import ops
from flash_decoding.errors import InvalidInput, Unsupported
from flash_decoding.spec import KVCache, Options, Queries
from flash_decoding.transformers.attention import HARMLESS, attention
from flash_decoding.transformers.bounds import Bounds, pack
from tests.transformers_tools import COMMON, FAMILIES, VOCAB, WINDOW, make_model, with_attention


def call(q_len: int = 3, kv_len: int = 8) -> dict[str, Any]:
    shapes = {"query": (2, 4, q_len, 16), "key": (2, 2, kv_len, 16), "value": (2, 2, kv_len, 16)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {"attention_mask": None}


class Seen:
    """Records what reaches the operator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Queries, KVCache, Options]] = []
        self.run = ops.attention
        monkeypatch.setattr(ops, "attention", self)

    def __call__(
        self, queries: Queries, cache: KVCache, options: Options, *, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        self.calls.append((queries, cache, options))
        return self.run(queries, cache, options, return_lse=return_lse)


def test_registration_can_be_repeated() -> None:
    flash_decoding.transformers.register()
    before = PreTrainedModel._check_and_adjust_attn_implementation
    flash_decoding.transformers.register()
    assert PreTrainedModel._check_and_adjust_attn_implementation is before
    assert "flash_decoding" in AttentionInterface()  # type: ignore[no-untyped-call]
    assert "flash_decoding" in AttentionMaskInterface()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_every_way_to_name_it(family: str, tmp_path: Path) -> None:
    """gpt-oss has a list of packages that it knows; our name is not to fall back to the first of them."""
    model = make_model(family)
    with_attention(model, "flash_decoding").save_pretrained(tmp_path)
    load: Any = AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path, attn_implementation="flash_decoding")
    make: Any = AutoModelForCausalLM.from_config
    made = make(FAMILIES[family](), attn_implementation="flash_decoding")
    for one in (loaded, made):
        assert one.config._attn_implementation == "flash_decoding"
    if loaded._can_set_experts_implementation():
        loaded.set_experts_implementation("eager")
    ids = torch.randint(3, VOCAB, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_other_names_are_checked_as_before() -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match="is not supported"):
        model.set_attn_implementation("flash_decoding_2")
    for name in ("sdpa", "eager"):
        with_attention(model, name)


def test_without_transformers_the_error_says_how_to_install_it() -> None:
    script = (
        "import sys; sys.modules['transformers'] = None\n"
        "import flash_decoding\n"
        "from flash_decoding.errors import MissingDependency\n"
        "try:\n    import flash_decoding.transformers\n"
        "except MissingDependency as error:\n    print(error)"
    )
    root = Path(__file__).parent.parent
    ran = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert "flash-decoding[transformers]" in ran.stdout


def test_tensors_are_views_and_heads_stay_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, given = Seen(monkeypatch), call()
    out, weights = attention(nn.Module(), **given)
    queries, cache, options = seen.calls[0]
    assert queries.q.data_ptr() == given["query"].data_ptr()
    assert cache.k.data_ptr() == given["key"].data_ptr()
    assert cache.v.data_ptr() == given["value"].data_ptr()
    assert cache.k.shape == (2, 8, 2, 16)
    assert out.shape == (2, 3, 4, 16)
    assert out.is_contiguous()
    assert weights is None
    assert options.window_right == 0, "causal unless somebody says otherwise"


def test_a_prompt_without_padding_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the planner may hand it to PyTorch's own kernels; so are later steps of a growing cache."""
    model, seen = with_attention(make_model("llama"), "flash_decoding"), Seen(monkeypatch)
    ids, cache = torch.randint(3, VOCAB, (2, 9)), DynamicCache(config=model.config)
    with torch.no_grad():
        for part in (ids, ids[:, :1]):
            model(
                part,
                attention_mask=torch.ones(2, cache.get_seq_length() + part.shape[1]),
                past_key_values=cache,
            )
    assert len(seen.calls) == 4
    for _, kv, _ in seen.calls:
        assert kv.dense
        assert kv.cache_leftpad is None
        assert kv.key_mask is None


def test_arguments_become_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, sinks = Seen(monkeypatch), torch.randn(4)
    attention(nn.Module(), **call(), scaling=0.5, sliding_window=5, softcap=3.0, s_aux=sinks, dropout=0.0)
    attention(nn.Module(), **call(), is_causal=False, softcap=None, sliding_window=None, s_aux=None)
    first, second = (options for _, _, options in seen.calls)
    assert (first.softmax_scale, first.window_left, first.window_right, first.softcap) == (0.5, 4, 0, 3.0)
    assert first.sinks is sinks
    assert (second.softmax_scale, second.window_left, second.window_right) == (0.25, -1, -1)
    assert second.is_plain


def test_the_layer_says_whether_it_is_causal_where_the_call_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, layer = Seen(monkeypatch), nn.Module()
    setattr(layer, "is_causal", False)  # noqa: B010 - a module declares its attributes by assignment
    attention(layer, **call())
    attention(layer, **call(), is_causal=True)
    assert [options.window_right for _, _, options in seen.calls] == [-1, 0]


REFUSED: dict[str, Any] = {
    "output_attentions": True,
    "head_mask": torch.ones(4),
    "position_bias": torch.zeros(1, 4, 3, 8),
    "cu_seq_lens_q": torch.tensor([0, 3]),
    "dropout": 0.1,
    "cache": object(),
    "seq_idx": torch.zeros(2, 3),
    "block_indices": torch.zeros(2, 3),
    "an_argument_of_tomorrow": False,
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_would_change_the_result_are_refused_by_name(name: str) -> None:
    with pytest.raises(Unsupported, match=name):
        attention(nn.Module(), **call(), **{name: REFUSED[name]})
    neutral: dict[str, Any] = {name: 0.0 if name == "dropout" else None}
    assert attention(nn.Module(), **call(), **neutral)[0].isfinite().all()


@pytest.mark.parametrize("name", HARMLESS)
def test_arguments_that_change_nothing_are_let_pass(name: str) -> None:
    given = call()
    plain, _ = attention(nn.Module(), **given)
    passed, _ = attention(nn.Module(), **given, **{name: torch.arange(3)})
    assert torch.equal(plain, passed)


def test_what_cannot_be_honoured_is_refused() -> None:
    lengths = torch.full((2,), 8, dtype=torch.int32)
    bounds: dict[str, Any] = {"starts": torch.zeros_like(lengths), "lengths": lengths}
    given = call()
    del given["attention_mask"]
    with pytest.raises(Unsupported, match="sliding_window without a causal mask"):
        attention(nn.Module(), **call(), is_causal=False, sliding_window=4)
    with pytest.raises(Unsupported, match="bidirectional mask"):
        attention(nn.Module(), **given, attention_mask=pack(Bounds(**bounds, causal=False)))
    with pytest.raises(Unsupported, match="causal mask"):
        attention(nn.Module(), **given, attention_mask=pack(Bounds(**bounds)), is_causal=False)
    with pytest.raises(Unsupported, match="window for a layer without"):
        attention(nn.Module(), **given, attention_mask=pack(Bounds(**bounds, windowed=True)))
    with pytest.raises(InvalidInput, match="attention_mask"):
        attention(nn.Module(), **given, attention_mask=torch.ones(2, 1, 3, 8, dtype=torch.bool))
    with pytest.raises(InvalidInput, match="cache_leftpad"):
        attention(nn.Module(), **given, attention_mask=pack(Bounds(lengths[:1], lengths[:1])))


def test_models_say_what_they_cannot_have() -> None:
    model, ids = with_attention(make_model("llama"), "flash_decoding"), torch.randint(3, VOCAB, (2, 9))
    with pytest.raises(Unsupported, match=r"no_grad"):
        model(ids)
    with torch.no_grad():
        with pytest.raises(InvalidInput, match="attention_mask"):
            model(ids, attention_mask=torch.ones(2, 1, 9, 9))
        packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
        with pytest.raises(Unsupported, match="packed sequences"):
            model(ids, position_ids=packed, use_cache=False)
        with pytest.raises((Unsupported, ValueError), match="output_attentions"):
            model(ids, output_attentions=True)


def test_a_window_that_only_the_mask_has_is_refused() -> None:
    """Phi-MoE's layers do not pass their window on: beyond it, attention would see too much."""
    flash_decoding.transformers.register()
    config = PhimoeConfig(**COMMON, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=2)
    config._attn_implementation = "flash_decoding"
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    ids = torch.randint(3, VOCAB, (2, WINDOW + 1))
    with torch.no_grad():
        assert model.eval()(ids[:, :WINDOW]).logits.isfinite().all()
        with pytest.raises(Unsupported, match="sliding_window"):
            model(ids)
