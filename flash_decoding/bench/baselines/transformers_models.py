"""Models as Transformers runs them: eager and sdpa over its own caches, and a compiled forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_decoding.bench.models.case import ModelCase
from flash_decoding.bench.models.column import ModelColumn

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Forward = Callable[..., Any]


def _padded(case: ModelCase, filled: Tensor, length: int) -> Tensor:
    """Keys or values of one layer as (batch, heads_kv, length, head_dim), sequences aligned to the right."""
    padded = filled.new_zeros(case.batch, length, *filled.shape[2:])
    for row, own in enumerate(case.filled):
        padded[row, length - own :] = filled[row, :own]
    return padded.transpose(1, 2)


class _Padded:
    """What ragged batches need: where each token stands, and which columns are padding on the left."""

    def __init__(self, case: ModelCase) -> None:
        longest = max(case.filled)
        self._filled = torch.tensor(case.filled, device=case.device)
        columns = torch.arange(case.context, device=case.device)
        self._exists = (columns >= (longest - self._filled)[:, None]).long() if case.is_ragged else None
        self._positions = self._filled[:, None].clone()

    def arguments(self, columns: int) -> dict[str, Tensor]:
        """Positions and mask of the next forward; a batch without padding is best left without a mask."""
        if self._exists is None:
            return {}
        return {"position_ids": self._positions, "attention_mask": self._exists[:, :columns]}

    def advance(self) -> None:
        """A token more in each sequence."""
        self._positions += 1

    def rewind(self) -> None:
        """Back to what was filled."""
        self._positions.copy_(self._filled[:, None])


class DynamicStepper:
    """A forward over a ``DynamicCache``, which grows by concatenation: what ``generate`` does by default."""

    def __init__(self, model: PreTrainedModel, case: ModelCase, implementation: str) -> None:
        from transformers import DynamicCache

        from flash_decoding.transformers.names import cache_argument

        model.set_attn_implementation(implementation)
        self._model, self._steps, self._longest = model, 0, max(case.filled)
        self._padded = _Padded(case)
        self._cache = DynamicCache(config=model.config)
        for layer in range(case.layers):
            k, v = (_padded(case, x.to(model.dtype), self._longest) for x in case.keys_and_values(layer))
            self._cache.update(k, v, layer)
        self._cached = {cache_argument(type(model).forward): self._cache}

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence; logits for the next."""
        self._steps += 1
        more = self._padded.arguments(self._longest + self._steps)
        result = self._model(input_ids=tokens, use_cache=True, **self._cached, **more)
        self._padded.advance()
        logits: Tensor = result.logits
        return logits

    def rewind(self) -> None:
        """Forget the steps made."""
        if self._steps:
            self._cache.crop(-self._steps)
        self._steps = 0
        self._padded.rewind()

    def close(self) -> None:
        """Nothing outside of this object."""


class StaticStepper:
    """A compiled forward over a ``StaticCache``."""

    def __init__(self, model: PreTrainedModel, case: ModelCase) -> None:
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        from flash_decoding.transformers.names import cache_argument

        model.set_attn_implementation("sdpa")
        self._length, self._capacity = max(case.filled), case.context
        self._padded, self._lengths = _Padded(case), list[Tensor]()
        self._cache: Cache = StaticCache(config=model.config, max_cache_len=case.context)
        for number, layer in enumerate(self._cache.layers[: case.layers]):
            k, v = (_padded(case, x, self._length) for x in case.keys_and_values(number))
            assert isinstance(layer, StaticLayer), "every layer is of full attention"
            layer.lazy_initialization(k, v)
            for storage, filled in ((layer.keys, k), (layer.values, v)):
                assert storage is not None
                storage[:, :, : self._length] = filled
            length = layer.cumulative_length
            assert isinstance(length, Tensor)
            self._lengths.append(length)
        self._cached = {cache_argument(type(model).forward): self._cache}
        self._forward: Forward = torch.compile(model.forward, mode="reduce-overhead")
        self.rewind()

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence; logits for the next."""
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        more = self._padded.arguments(self._capacity)
        result = self._forward(input_ids=tokens, use_cache=True, **self._cached, **more)
        self._padded.advance()
        logits: Tensor = result.logits
        return logits

    def rewind(self) -> None:
        """Forget the steps made."""
        for length in self._lengths:
            length.fill_(self._length)
        self._padded.rewind()

    def close(self) -> None:
        """Drop what was compiled: the next context starts anew, and its graphs hold memory."""
        torch.compiler.reset()


def eager(model: PreTrainedModel, case: ModelCase) -> DynamicStepper:
    """The primitives; what the gate compares with, too."""
    return DynamicStepper(model, case, "eager")


def _sdpa(model: PreTrainedModel, case: ModelCase) -> DynamicStepper:
    return DynamicStepper(model, case, "sdpa")


EAGER = ModelColumn(
    "eager",
    "PyTorch primitives: Transformers' eager attention over its DynamicCache",
    "peer",
    eager,
)
SDPA = ModelColumn(
    "sdpa",
    "Transformers' sdpa attention over its DynamicCache, as generate runs it by default",
    "peer",
    _sdpa,
)
COMPILED = ModelColumn(
    "sdpa compiled",
    'Transformers\' sdpa attention over its StaticCache, torch.compile(mode="reduce-overhead")',
    "peer",
    StaticStepper,
    compiles=True,
)
