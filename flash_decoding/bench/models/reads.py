"""What a decode step of a model has to read of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names that configurations give to the number of their experts."""


def is_mixture(config: PretrainedConfig) -> bool:
    """Whether tokens read weights of their own: a mixture of experts."""
    return any((getattr(config, name, None) or 1) > 1 for name in EXPERTS)


def weight_bytes(model: PreTrainedModel, batch: int) -> int:
    """Bytes of the parameters that a step of one token per sequence reads, each once.

    Of a table that only embeds tokens it reads a row per sequence; one that gives the logits as well it reads
    on the whole.
    """
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    assert isinstance(table, Tensor)
    every = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if table is head:
        return every
    row = table.shape[1] * table.element_size()
    return every - table.numel() * table.element_size() + batch * row
