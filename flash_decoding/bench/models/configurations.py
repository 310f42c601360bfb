"""Models by name: their published sizes, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """What models of several sizes have in common."""

    model_type: str
    """As in Transformers."""
    rope: Mapping[str, Any]
    positions: int
    """Longest context that they were made for; measuring may go beyond."""
    eps: float = 1e-5


@dataclass(frozen=True)
class Configuration:
    """One model: what Transformers needs to build it, and how large it is said to be."""

    name: str
    parameters: float
    """Published number of parameters; tests hold the numbers below to it."""
    family: Family
    hidden: int
    inner: int
    """Width of the feed-forward layers."""
    layers: int
    heads_q: int
    heads_kv: int
    vocabulary: int
    head_dim: int = 128
    tied: bool = False
    """One table embeds tokens and gives their logits."""

    def config(self) -> PretrainedConfig:
        """The same for Transformers."""
        from transformers import AutoConfig

        family = self.family
        config: PretrainedConfig = AutoConfig.for_model(
            family.model_type,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads_q,
            num_key_value_heads=self.heads_kv,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            rope_parameters=dict(family.rope),
            max_position_embeddings=family.positions,
            rms_norm_eps=family.eps,
            tie_word_embeddings=self.tied,
        )
        return config


CODE_LLAMA = Family("llama", {"rope_type": "default", "rope_theta": 1e6}, 16384)
LLAMA_3_1 = Family(
    "llama",
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    131072,
)
QWEN_3 = Family("qwen3", {"rope_type": "default", "rope_theta": 1e6}, 40960, eps=1e-6)

TINY = Configuration("tiny-llama-cpu", 26.5e6, CODE_LLAMA, 512, 1408, 4, 16, 2, 8192)
"""Small enough that two cores make a step in tens of milliseconds; the heads are the announcement's."""

# name, parameters, family, hidden, inner, layers, heads_q, heads_kv, vocabulary
CONFIGURATIONS: tuple[Configuration, ...] = (
    TINY,
    Configuration("CodeLlama-7B", 6.74e9, CODE_LLAMA, 4096, 11008, 32, 32, 32, 32016),
    Configuration("CodeLlama-13B", 13.02e9, CODE_LLAMA, 5120, 13824, 40, 40, 40, 32016),
    Configuration("CodeLlama-34B", 33.74e9, CODE_LLAMA, 8192, 22016, 48, 64, 8, 32000),
    Configuration("Llama-3.1-8B", 8.03e9, LLAMA_3_1, 4096, 14336, 32, 32, 8, 128256),
    Configuration("Llama-3.1-70B", 70.55e9, LLAMA_3_1, 8192, 28672, 80, 64, 8, 128256),
    Configuration("Qwen3-0.6B", 0.596e9, QWEN_3, 1024, 3072, 28, 16, 8, 151936, tied=True),
    Configuration("Qwen3-4B", 4.02e9, QWEN_3, 2560, 9728, 36, 32, 8, 151936, tied=True),
    Configuration("Qwen3-8B", 8.19e9, QWEN_3, 4096, 12288, 36, 32, 8, 151936),
    Configuration("Qwen3-14B", 14.77e9, QWEN_3, 5120, 17408, 40, 40, 8, 151936),
    Configuration("Qwen3-32B", 32.76e9, QWEN_3, 5120, 25600, 64, 64, 8, 151936),
)
BY_NAME = {configuration.name.lower(): configuration for configuration in CONFIGURATIONS}
