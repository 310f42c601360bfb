"""Where a model comes from: the table of configurations, with random weights, or a checkpoint."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flash_decoding.bench.models.configurations import BY_NAME, CONFIGURATIONS
from flash_decoding.bench.models.reads import is_mixture
from flash_decoding.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SLICE_LAYERS = 2
"""Layers of the small model that columns are checked on."""


@dataclass(frozen=True, eq=False)
class Source:
    """A model that can be measured."""

    name: str
    config: PretrainedConfig
    checkpoint: str | None = None
    """Folder or id of the hub; None: random weights."""

    @classmethod
    def find(cls, name: str) -> Source:
        """A configuration by name, whatever its case, else a folder or an id of the hub.

        Raises:
            InvalidInput: it is none of them.
            Unsupported: what a step of this model reads cannot be counted, or filled in.
        """
        known = BY_NAME.get(name.lower())
        if known is not None:
            return cls(known.name, known.config())
        if not (Path(name) / "config.json").is_file() and name.count("/") != 1:
            names = ", ".join(configuration.name for configuration in CONFIGURATIONS)
            raise InvalidInput("model", repr(name), f"a folder with a model, an id of the hub, or {names}")
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(name)
        reasons = _reasons_against(config)
        if reasons:
            raise Unsupported(f"measuring the model {name!r}", reasons)
        return cls(name.rstrip("/").rsplit("/", maxsplit=1)[-1], config, name)

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def heads_kv(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        heads_q = self.config.num_attention_heads
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // heads_q)

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The whole model on the device; random weights come to be there and never lie anywhere else."""
        if self.checkpoint is None:
            return _random(self.config, dtype, device)
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=dtype)
        model.train(False)
        model.to(device)  # type: ignore[arg-type]  # its annotation knows no torch.device
        return model

    def slice(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Two layers of the same widths between the same embeddings, with random weights."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = min(SLICE_LAYERS, self.layers)
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        return _random(config, dtype, device)


def _reasons_against(config: PretrainedConfig) -> tuple[str, ...]:
    """Why the suite cannot say what a step of this model reads."""
    reasons = []
    if getattr(config, "num_hidden_layers", None) is None:
        reasons.append("its configuration names no layers of one text model")
    if is_mixture(config):
        reasons.append("a mixture of experts reads other weights for every token")
    window = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    others = set(getattr(config, "layer_types", None) or [window]) - {"full_attention"}
    if others:
        reasons.append(f"its layers are not all of full attention: {', '.join(sorted(others))}")
    return tuple(reasons)


def _random(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    model.train(False)
    return model
