"""Who generates: our decoder, or Transformers alone to compare with."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flash_decoding.cli.generation.job import USUAL_CHUNK, Job
from flash_decoding.cli.generation.stream import Stream, Streamer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


class Engine(Protocol):
    """Generates behind one prompt, and hands each token to a stream."""

    compile_seconds: float
    """Spent on kernels before the clock started."""

    def generate(self, prompt: Tensor, config: GenerationConfig, stream: Stream) -> None:
        """Go on from ``prompt`` (tokens,) on the model's device until the configuration says stop."""


class Ours:
    """Our decoder, warmed up: kernels are compiled and the step is captured before the clock starts.

    Args:
        model: the model.
        capacity: tokens that there is room for.
        job: what was asked for.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, job: Job) -> None:
        from flash_decoding.decoder import Decoder

        self._decoder: Any = Decoder(model, capacity=capacity, prefill_chunk=job.prefill_chunk or USUAL_CHUNK)
        self.compile_seconds = _warm_up(self._decoder) if model.device.type == "cuda" else 0.0

    def generate(self, prompt: Tensor, config: GenerationConfig, stream: Stream) -> None:
        """Go on from ``prompt`` (tokens,) on the model's device."""
        self._decoder.generate(
            [prompt],
            generation_config=config,
            on_tokens=lambda rows: stream.write(rows[0]),
            progress=stream.progress,
        )


class Transformers:
    """``model.generate``, with the attention of Transformers that the model was loaded with.

    Args:
        model: the model.
        job: what was asked for.
    """

    compile_seconds = 0.0

    def __init__(self, model: PreTrainedModel, job: Job) -> None:
        self._model: Any = model

    def generate(self, prompt: Tensor, config: GenerationConfig, stream: Stream) -> None:
        """Go on from ``prompt`` (tokens,) on the model's device."""
        tokens = prompt[None]
        mask = torch.ones_like(tokens)
        self._model.generate(tokens, attention_mask=mask, generation_config=config, streamer=Streamer(stream))


def _warm_up(decoder: Any) -> float:
    """Seconds that two steps take, which are forgotten: the first one compiles, the second is captured."""
    start = time.perf_counter()
    for _ in range(2):
        decoder.step(torch.zeros(1, 1, dtype=torch.long, device=decoder.device))
        decoder.reset()
    torch.cuda.synchronize(decoder.device)
    return time.perf_counter() - start
