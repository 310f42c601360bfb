"""Whether a model and its keys and values fit, before any are loaded; and what of them a step reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flash_decoding.bench.models.reads import is_mixture, weight_bytes
from flash_decoding.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GIB = 1 << 30


def check_memory(
    config: PretrainedConfig, *, capacity: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Compare weights, keys and values with the memory that is free.

    Where the system does not say how much is free, nothing is compared. Activations come on top; they are
    small while prompts go through in chunks.

    Raises:
        InvalidInput: too little memory; it says which context fits.
    """
    free = free_bytes(device)
    if free is None or getattr(config, "quantization_config", None) is not None:
        return  # quantised weights are smaller than the configuration says
    weights, token = model_bytes(config, dtype), kv_bytes(config, 1, dtype)
    if weights >= free:
        got = f"{weights / GIB:.2f} GiB of weights in {dtype}"
        raise InvalidInput("model", got, f"less than {free / GIB:.2f} GiB, which are free on {device}")
    fits = (free - weights) // token
    if capacity > fits:
        got = f"{capacity} tokens: {capacity * token / GIB:.2f} GiB of keys and values"
        beside = (
            f"{free / GIB:.2f} GiB are free on {device}, and the weights take {weights / GIB:.2f} of them"
        )
        raise InvalidInput("context", got, f"at most {fits} tokens: {beside}")


def model_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of all parameters and buffers; they are counted, not allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def kv_bytes(config: PretrainedConfig, capacity: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one sequence.

    Raises:
        Unsupported: the model's layers do not all keep keys and values of the same sizes.
    """
    from flash_decoding.transformers.cache import FlashCache

    return FlashCache.bytes_for(config, batch=1, capacity=capacity, dtype=dtype)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, or what this system could give to a program; None where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if not told.exists():
        return None
    fields = dict(line.split(":") for line in told.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10


def step_bytes(model: PreTrainedModel, tokens: float) -> float | None:
    """Bytes that a step of one sequence has to read: weights, and keys and values of the visible tokens.

    None for a mixture of experts, where they differ from token to token.

    Args:
        model: whose parameters are loaded.
        tokens: live ones of the sequence.
    """
    text = model.config.get_text_config(decoder=True)
    if is_mixture(text):
        return None
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    window = getattr(text, "sliding_window", None) or tokens
    visible = [min(tokens, window) if kind == "sliding_attention" else tokens for kind in kinds]
    return weight_bytes(model, batch=1) + kv_bytes(model.config, 1, model.dtype) * sum(visible) / len(visible)
