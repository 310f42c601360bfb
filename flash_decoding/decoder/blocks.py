"""What a model of the Llama family is made of, read off Transformers' modules: weights stay theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flash_decoding.projection import Activation, Norm, Projection
from flash_decoding.spec import Options, Rotary

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose layers are these blocks and nothing else: any other goes through its own forward."""

ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

STATIC_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose angles depend on nothing but the position."""


@dataclass(frozen=True, eq=False)
class Block:
    """A layer: attention and feed-forward, each with the norm before it."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    options: Options
    q_norm: Norm | None = None
    """Over each head's vector, before the rotation."""
    k_norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class Blocks:
    """A model: embedding, layers, and the head with the last norm."""

    embedding: Tensor
    layers: tuple[Block, ...]
    head: Projection
    rotary: Rotary
    heads_q: int
    heads_kv: int
    head_dim: int


def why_not(model: PreTrainedModel) -> tuple[str, ...]:
    """Reasons why a model is not read as blocks; none if it is."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    kinds = {type(module) for name, module in model.named_modules() if name.endswith("_proj")}
    checks = (
        (config.model_type not in FAMILIES, f"its type {config.model_type!r} is none of {sorted(FAMILIES)}"),
        (
            getattr(config, "hidden_act", None) not in ACTIVATIONS,
            f"its activation is none of {sorted(ACTIVATIONS)}",
        ),
        (
            rope.get("rope_type", "default") not in STATIC_ROTARY,
            "its rotary angles depend on more than positions",
        ),
        (kinds != {nn.Linear}, "its linear layers are quantised, wrapped or adapted"),
        (
            not all(_is_plain(layer.weight, model) for layer in layers),
            f"its weights are not all {model.dtype}, contiguous, and on {model.device}",
        ),
        (getattr(config, "pretraining_tp", 1) != 1, "its weights are used in slices (pretraining_tp)"),
    )
    return tuple(reason for fails, reason in checks if fails)


def _is_plain(weight: Tensor, model: PreTrainedModel) -> bool:
    return weight.dtype == model.dtype and weight.device == model.device and weight.is_contiguous()


def read(model: PreTrainedModel, *, positions: int) -> Blocks:
    """The blocks of a model that :func:`why_not` has nothing against; no weight is copied.

    Args:
        model: a causal language model of one of :data:`FAMILIES`.
        positions: how many positions the rotary tables hold.
    """
    body: Any = model.model
    config = model.config
    first = body.layers[0].self_attn
    head: Any = model.lm_head
    embedding: Any = model.get_input_embeddings()
    return Blocks(
        embedding=embedding.weight,
        layers=tuple(_block(layer, ACTIVATIONS[config.hidden_act]) for layer in body.layers),
        head=Projection((head.weight,), _biases(head), norm=_norm(body.norm)),
        rotary=_rotary(body.rotary_emb, model, positions),
        heads_q=config.num_attention_heads,
        heads_kv=config.num_key_value_heads,
        head_dim=first.head_dim,
    )


def _block(layer: Any, activation: Activation) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    window = getattr(attention, "sliding_window", None) or _mistral_window(attention)
    return Block(
        qkv=_projection(
            attention.q_proj, attention.k_proj, attention.v_proj, norm=_norm(layer.input_layernorm)
        ),
        out=_projection(attention.o_proj),
        gate_up=_projection(
            mlp.gate_proj,
            mlp.up_proj,
            norm=_norm(layer.post_attention_layernorm),
            gated=activation,
        ),
        down=_projection(mlp.down_proj),
        options=Options.make(
            head_dim=attention.head_dim,
            softmax_scale=attention.scaling,
            causal=True,
            window_size=(-1 if window is None else window - 1, -1),
        ),
        q_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
    )


def _mistral_window(attention: Any) -> int | None:
    """Mistral keeps the window in its configuration alone; Qwen2's layers have it, or None."""
    if attention.config.model_type != "mistral":
        return None
    window: int | None = attention.config.sliding_window
    return window


def _projection(*layers: nn.Linear, norm: Norm | None = None, gated: Activation | None = None) -> Projection:
    biases = _biases(*layers)
    return Projection(tuple(layer.weight for layer in layers), biases, norm, gated)


def _biases(*layers: nn.Linear) -> tuple[Tensor, ...]:
    return tuple(layer.bias for layer in layers if layer.bias is not None)


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


@torch.no_grad()
def _rotary(module: Any, model: PreTrainedModel, positions: int) -> Rotary:
    """The angles of all positions, as the model itself computes them; halves are repeated there."""
    places = torch.arange(positions, device=model.device)[None]
    cos, sin = module(torch.empty(0, dtype=model.dtype, device=model.device), places)
    half = cos.shape[-1] // 2
    return Rotary(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
