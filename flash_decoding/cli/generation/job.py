"""What was asked for on the command line, and whether it makes sense before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flash_decoding.bench.request import DTYPES, Request, device_of
from flash_decoding.errors import InvalidInput

ATTENTION = ("flash_decoding", "eager", "sdpa")
"""Ours, and what Transformers has itself."""

USUAL_CHUNK = 2048


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt for one model."""

    model: str
    """Folder of a checkpoint, or an id of the hub."""
    prompt: str
    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    context: int | None = None
    """Tokens that there is room for; None: the prompt's and the new ones."""
    dtype: str | None = None
    """None: that of the checkpoint."""
    device: str | None = None
    """None: the GPU where there is one."""
    attention: str = "flash_decoding"
    chat: bool = False
    prefill_chunk: int | None = None
    """Tokens of a chunk of the prompt; None: 2048 for ours, one chunk for Transformers'."""

    def check(self) -> None:
        """Refuse what no model could do.

        Raises:
            InvalidInput: the option, and what would do.
        """
        for name, low in (("max_new_tokens", 1), ("context", 1), ("prefill_chunk", 1), ("top_k", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise InvalidInput(name, value, f"{low} or more")
        if not 0 <= self.temperature < float("inf"):
            raise InvalidInput("temperature", self.temperature, "0, or more for more variety")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidInput("top_p", self.top_p, "a share of the probability, above 0 and up to 1")
        if self.attention not in ATTENTION:
            raise InvalidInput("attention", repr(self.attention), " or ".join(ATTENTION))
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InvalidInput("dtype", repr(self.dtype), " or ".join(DTYPES))
        for name in ("top_p", "top_k", "seed"):
            if self.temperature == 0 and getattr(self, name) is not None:
                wanted = "a temperature above 0 to go with it: at 0 the likeliest token is taken"
                raise InvalidInput(name, getattr(self, name), wanted)

    @property
    def is_ours(self) -> bool:
        return self.attention == "flash_decoding"

    def place(self) -> torch.device:
        """The device, made the current one.

        Raises:
            InvalidInput: there is no such device here.
        """
        return device_of(Request(device=self.device))

    def sampling(self) -> dict[str, Any]:
        """Fields of a GenerationConfig; those of the checkpoint that choose tokens do not count."""
        if self.temperature == 0:
            chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            chosen = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": 1.0 if self.top_p is None else self.top_p,
                "top_k": 0 if self.top_k is None else self.top_k,
            }
        return {**chosen, "max_new_tokens": self.max_new_tokens, "num_beams": 1}
