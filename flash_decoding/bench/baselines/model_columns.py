"""The columns of the model suite, in the order of the table. A new one is one more name here."""

from __future__ import annotations

import importlib.util

import torch

from flash_decoding.bench.baselines import decoder_models, transformers_models
from flash_decoding.bench.models.column import ModelColumn

BOUND = ModelColumn(
    "bound", "weights, live keys and values read once, at the bandwidth that a large copy reaches", "floor"
)


def model_columns(device: torch.device) -> tuple[ModelColumn, ...]:
    """All contenders on a device; each says itself where it does not run."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    on_gpu = device.type == "cuda"
    return (
        transformers_models.EAGER,
        transformers_models.COMPILED if on_gpu else transformers_models.SDPA,
        decoder_models.UNSPLIT,
        decoder_models.ONE_BLOCK_VLLM if has_vllm else decoder_models.ONE_BLOCK_STAND_IN,
        decoder_models.OURS,
        BOUND,
    )
