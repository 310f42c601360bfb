"""Small random models of the families that people run, and how far their logits may be apart.

The yardstick is what the model itself loses: eager attention in the dtype of the test against eager attention
with everything in float64. Ours may be three times as far from float64 by its largest error, and twice by its
RMS error, which a few lucky elements cannot hide; one rounding of the largest logit is added for models that
happen to be exact.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
    masking_utils,
)

import flash_decoding.transformers

VOCAB = 96
WINDOW = 6
LAYERS = ["sliding_attention", "full_attention"]

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # far from even attention, so that a wrong mask shows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "codellama": lambda: LlamaConfig(
        **COMMON | {"num_key_value_heads": 4}, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON),
    "gemma2": lambda: Gemma2Config(
        **COMMON,
        sliding_window=WINDOW,
        layer_types=LAYERS,
        attn_logit_softcapping=3.0,
        query_pre_attn_scalar=24,
    ),
    "gemma3": lambda: Gemma3TextConfig(**COMMON, sliding_window=WINDOW, layer_types=LAYERS),
    "gpt_oss": lambda: GptOssConfig(
        # every expert takes part: choosing among them would turn a rounding into another result
        **COMMON,
        sliding_window=WINDOW,
        layer_types=LAYERS,
        num_local_experts=3,
        num_experts_per_tok=3,
    ),
}


def make_model(family: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A random model with eager attention; biases, norms and sinks are drawn, too."""
    flash_decoding.transformers.register()
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config._attn_implementation = "eager"
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # others have no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.to(device=device, dtype=dtype).eval()


@dataclass(frozen=True)
class Scenario:
    """How tokens reach a model: in pieces of ``sizes``, with a cache, with padding on one side or both."""

    sizes: tuple[int, ...]
    cache: str = "dynamic"
    padding: str = "none"

    def __str__(self) -> str:
        return f"{self.cache}-{self.padding}-{'.'.join(map(str, self.sizes))}"

    @property
    def tokens(self) -> int:
        return sum(self.sizes)


STEPS = (9, 1, 1, 1, 1)
SCENARIOS = (
    Scenario((13,), "none"),
    Scenario((13,), "none", "left"),
    Scenario((5, 4, 4)),
    Scenario(STEPS),
    Scenario(STEPS, "static"),
    Scenario((5, 4, 3, 1), "static"),
    *(Scenario(STEPS, cache, padding) for cache in ("dynamic", "static") for padding in ("left", "right")),
    Scenario((5, 4, 3, 1), "dynamic", "both"),
    Scenario((5, 4, 3, 1), "static", "both"),
)


def padding_mask(scenario: Scenario) -> Tensor | None:
    """(3, tokens) ones with holes in the first piece: sequence 0 has none, the others have two and four."""
    if scenario.padding == "none":
        return None
    mask = torch.ones(3, scenario.tokens, dtype=torch.int64)
    first = scenario.sizes[0]
    for row, pads in ((1, 2), (2, 4)):
        left = {"left": pads, "right": 0, "both": pads // 2}[scenario.padding]
        mask[row, :left] = 0
        mask[row, first - (pads - left) : first] = 0
    return mask


def make_cache(model: Any, kind: str) -> Cache | None:
    if kind == "none":
        return None
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=20)
    return DynamicCache(config=model.config)


def run(model: Any, scenario: Scenario, ids: Tensor) -> Tensor:
    """Logits (tokens that are no padding, vocabulary) of a model that reads ``ids`` piece by piece."""
    mask = padding_mask(scenario)
    real = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    cache, begin, logits = make_cache(model, scenario.cache), 0, []
    for size in scenario.sizes:
        end = begin + size
        out = model(
            ids[:, begin:end],
            attention_mask=None if mask is None else real[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        logits.append(out.logits)
        begin = end
    return torch.cat(logits, dim=1)[real.bool()]


def with_attention(model: Any, name: str) -> Any:
    """The model itself, switched to an attention implementation."""
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    return model


@contextmanager
def masks_for_float64() -> Iterator[None]:
    """Let eager attention work in float64 where a padding token sees nothing.

    Its masks hold the lowest number of the dtype, its softmax computes in float32: the lowest float64 becomes
    -inf there, a row of them NaN, and NaN spreads from a padding token to all others.
    """

    def in_float32(**call: Any) -> Tensor | None:
        mask = masking_utils.eager_mask(**call | {"dtype": torch.float32})
        return None if mask is None else mask.double()

    AttentionMaskInterface.register("eager", in_float32)
    yield
    AttentionMaskInterface.register("eager", masking_utils.eager_mask)


def assert_logits(model: Any, scenario: Scenario, read: Callable[..., Tensor] = run) -> None:
    """Assert that ours are as close to eager in float64 as eager in the model's dtype is.

    Args:
        read: how our logits come about, with the parameters of :func:`run`.
    """
    assert torch.get_float32_matmul_precision() == "highest", "TF32 would make the yardstick too long"
    ids = torch.randint(3, VOCAB, (3, scenario.tokens)).to(model.device)
    with torch.no_grad():
        with masks_for_float64():
            exact = run(with_attention(copy.deepcopy(model).double(), "eager"), scenario, ids)
        lost = run(with_attention(model, "eager"), scenario, ids).double() - exact
        error = read(with_attention(model, "flash_decoding"), scenario, ids).double() - exact
    floor = torch.finfo(model.dtype).eps * exact.abs().max()
    largest, budget = error.abs().max(), 3 * lost.abs().max() + floor
    assert largest <= budget, f"{scenario}: largest error {largest:.3g}, budget {budget:.3g}"
    rms, budget = _rms(error), 2 * _rms(lost) + floor
    assert rms <= budget, f"{scenario}: RMS error {rms:.3g}, budget {budget:.3g}"


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def assert_same_tokens(model: Any, generate: Callable[[Any], Tensor | Sequence[Tensor]]) -> None:
    """Assert that ``generate`` gives the tokens of eager attention with ours, seeds included."""
    found = []
    for name in ("eager", "flash_decoding"):
        torch.manual_seed(7)
        found.append(generate(with_attention(model, name)))
    wanted, got = found
    assert len(wanted) == len(got)
    for one, other in zip(wanted, got, strict=True):
        assert torch.equal(one, other), f"{other.tolist()} instead of {one.tolist()}"
