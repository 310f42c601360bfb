"""A checkpoint by folder or hub id: configuration, tokenizer, weights, and what is wrong with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flash_decoding.errors import InvalidInput, MissingDependency, Unsupported

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

INSTALL = 'pip install "flash-decoding[transformers]"'

BROKEN = (OSError, ValueError, KeyError, ImportError)
"""What Transformers raises where a file is missing, damaged, or needs a package that is not there."""

SHOWN = 3
"""Names of missing weights that an error lists."""


def need_transformers() -> None:
    """Make sure that Transformers is there.

    Raises:
        MissingDependency: it is not.
    """
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependency("transformers", INSTALL)


def load_config(source: str) -> PretrainedConfig:
    """The configuration of a causal language model.

    Raises:
        InvalidInput: there is no model of this name.
        Unsupported: it does not write text token by token, or needs code of its own.
    """
    from transformers import AutoConfig

    _check_source(source)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except BROKEN as error:
        raise InvalidInput("model", repr(source), f"one with a config.json ({_brief(error)})") from error
    reasons = _why_not(config)
    if reasons:
        raise Unsupported(f"generating with {source!r}", reasons)
    return config


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the weights.

    Raises:
        InvalidInput: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except BROKEN as error:
        raise InvalidInput("model", repr(source), f"one with a tokenizer ({_brief(error)})") from error
    return tokenizer


def load_model(
    source: str, config: PretrainedConfig, *, dtype: torch.dtype, device: torch.device, attention: str | None
) -> PreTrainedModel:
    """The model with its weights on the device.

    Args:
        source: folder, or id of the hub.
        config: what :func:`load_config` gave.
        dtype: of the weights.
        device: where they go.
        attention: Transformers' name of an attention implementation; None for its own choice.

    Raises:
        InvalidInput: weights are missing or cannot be read.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if importlib.util.find_spec("accelerate") is not None:
        options["device_map"] = {"": device}  # each tensor goes there at once; without it, over the host
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
        )
    except BROKEN as error:
        wanted = f"a checkpoint with all its weights ({_brief(error)})"
        raise InvalidInput("model", repr(source), wanted) from error
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:  # Transformers would go on with random ones
        names = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise InvalidInput("model", repr(source), f"a checkpoint with all its weights; it lacks {names}")
    placed: PreTrainedModel = model.to(device).eval()
    return placed


def _check_source(source: str) -> None:
    path = Path(source).expanduser()
    if path.is_dir():
        return
    if path.exists():
        raise InvalidInput("model", repr(source), "the folder of a checkpoint, not a file of it")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InvalidInput("model", repr(source), "a folder that exists, or an id of the hub")


def _why_not(config: PretrainedConfig) -> tuple[str, ...]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(config, "auto_map", None):
        return ("it comes with code of its own, which is not run here",)
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    names = (known,) if isinstance(known, str) else known or ()
    claimed = config.architectures or names
    if not set(names) & set(claimed):
        what = ", ".join(claimed) or config.model_type
        return (f"{what} is no causal language model of Transformers",)
    return ()


def _brief(error: Exception) -> str:
    """The first line of a message: Transformers' go on with advice."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
