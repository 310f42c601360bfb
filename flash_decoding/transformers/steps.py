"""The steps of a cache for models: what the host counts before a forward, and what each layer then writes."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from flash_decoding import ops
from flash_decoding.cache import ContiguousCache, PagedCache
from flash_decoding.cache.ledger import upload
from flash_decoding.errors import CacheFull, InvalidInput, Unsupported
from flash_decoding.spec import KVCache, NewTokens

Storage: TypeAlias = ContiguousCache | PagedCache


@dataclass(eq=False)
class Step:
    """A forward that is under way, or about to be."""

    rows: Sequence[int]
    q_len: int
    before: list[int]
    """Lengths of all rows of the cache before the step."""
    opened: bool
    """Somebody else opened the step, and will close it."""
    index: Tensor | None = None
    """(rows,) int32 on the device, where the rows are not neighbours."""
    layer: int = 0
    """The layer that comes next."""
    views: list[KVCache] = dataclasses.field(default_factory=list)


class Steps:
    """A storage, the rows of it that are in use, and the step that is under way.

    Args:
        storage: what keeps the keys and values of all layers.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.layers = storage.keys.shape[0]
        self.step: Step | None = None
        self._counts = [0] * storage.batch
        self._counts_on_device = torch.zeros_like(storage.cache_seqlens)
        self._in_use = storage.batch
        self._views: tuple[tuple[int, int, int], list[KVCache]] = ((0, 0, 0), [])

    @property
    def rows(self) -> Sequence[int]:
        """Rows that a forward works on: those of the step that is under way, or those in use."""
        return range(self.in_use) if self.step is None else self.step.rows

    @property
    def in_use(self) -> int:
        """Rows of a forward that nobody opened a step for: all of them while the cache is empty."""
        return self._in_use if any(self.storage.lengths) else self.storage.batch

    def seq_length(self, layer: int) -> int:
        """Longest of the rows, as a layer finds it: with the tokens of this step once it has them."""
        behind = self.step is not None and layer >= self.step.layer
        lengths = self.step.before if self.step is not None and behind else self.storage.lengths
        return max(lengths[row] for row in self.rows)

    @contextmanager
    def opened(
        self, tokens: int | Sequence[int], rows: slice | Sequence[int] | None, q_len: int | None
    ) -> Iterator[None]:
        """The host's part of a step, and its end; if what runs inside fails, the lengths are as before."""
        self.closed("step")
        chosen = self._chosen(rows)
        counts = [tokens] * len(chosen) if isinstance(tokens, int) else list(tokens)
        if len(counts) != len(chosen):
            raise InvalidInput("tokens", tokens, f"a number >= 0, or {len(chosen)} of them: one a row")
        longest = max(counts)
        columns = longest if q_len is None else q_len
        if columns < max(longest, 1):
            raise InvalidInput("q_len", columns, f"{max(longest, 1)} or more, as many as the longest row has")
        step = self._begin(chosen, counts, columns, opened=True)
        done = False
        try:
            yield
            if step.layer not in (0, self.layers):
                raise InvalidInput(
                    "layer_idx", f"layers 0 to {step.layer - 1} alone", "all layers of the model"
                )
            done = True
        finally:
            self.step = None
            if not done:
                self.truncate(step.before)

    def append(self, k: Tensor, v: Tensor, layer: int) -> KVCache:
        """Append a layer's new tokens, and give what its attention reads.

        Args:
            k: (rows, heads_kv, q_len, head_dim).
            v: (rows, heads_kv, q_len, head_dim_v).
            layer: from 0 to the last, in this order; the first one begins the step on the device.
        """
        self._check_order(layer)
        self._check("key_states", k, self.storage.keys)
        self._check("value_states", v, self.storage.values)
        if k.shape[:3] != v.shape[:3]:
            raise InvalidInput("value_states", tuple(v.shape), f"{(*k.shape[:3], v.shape[3])}, as key_states")
        step = self.step or self._begin_unopened(k)
        if layer == 0:
            self._launch(step)
        view = step.views[layer]
        ops.append_kv(NewTokens(k.transpose(1, 2), v.transpose(1, 2)), view)
        step.layer += 1
        if step.layer == self.layers and not step.opened:
            self.step = None
        return view

    def begin(self) -> list[KVCache]:
        """The device's part of a step that somebody else's kernels append in."""
        if self.step is None or not self.step.opened:
            raise InvalidInput("begin", "a call without a step", "a call inside of `with cache.step(...)`")
        self._check_order(0)
        self._launch(self.step)
        self.step.layer = self.layers
        return self.step.views

    def lengths_on_device(self) -> Tensor:
        """(rows,) int32: tokens of the rows of the step, or of those in use."""
        lengths = self.storage.cache_seqlens
        if self.step is not None and self.step.index is not None:
            return lengths.index_select(0, self.step.index)
        return lengths[self.rows[0] : self.rows[-1] + 1]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Shorten all rows, those that change; a forward that stopped half-way is over with it."""
        self.closed("truncate", unless_half_way=True)
        lengths, now = [operator.index(length) for length in lengths], self.storage.lengths
        if len(lengths) != len(now) or any(
            not 0 <= new <= old for new, old in zip(lengths, now, strict=True)
        ):
            raise InvalidInput("lengths", lengths, f"one for each row, at most {now}")
        self.step = None
        for row, length in enumerate(lengths):
            if length != now[row]:
                self.storage.truncate(row, length)

    def reset(self) -> None:
        """Empty all rows."""
        self.closed("reset", unless_half_way=True)
        self.step = None
        self.storage.free()

    def select(self, sources: Sequence[int]) -> None:
        """Let the rows in use be copies of these, and free the others."""
        self.closed("reordering")
        rest = range(len(sources), self.storage.batch)
        if len(sources) > self.storage.batch or any(not 0 <= row < self.in_use for row in sources):
            wanted = f"at most {self.storage.batch} rows (the batch of the cache) from 0 to {self.in_use - 1}"
            raise InvalidInput("rows", list(sources), wanted)
        before = self.in_use
        self.storage.reorder([*sources, *rest])
        if len(sources) < before:
            self.storage.free(slice(len(sources), before))
        self._in_use = len(sources)

    def closed(self, what: str, *, unless_half_way: bool = False) -> None:
        """Refuse what cannot be done in the middle of a step."""
        if self.step is None or (unless_half_way and not self.step.opened):
            return
        if self.step.opened:
            raise InvalidInput(what, "a call inside of a step", "a call behind its with block")
        raise InvalidInput(what, *self._half_way())

    def _half_way(self) -> tuple[str, str]:
        assert self.step is not None
        stopped = f"a cache whose last forward stopped before layer {self.step.layer} of {self.layers}"
        return stopped, f"truncate({self.step.before}), or reset(), before anything else"

    def _begin(self, rows: Sequence[int], counts: list[int], q_len: int, *, opened: bool) -> Step:
        """The host's part: room for all rows, or an error and nothing has changed."""
        storage = self.storage
        before = list(storage.lengths)
        for row, count in zip(rows, counts, strict=True):
            room = storage.capacity - before[row]
            # Attention takes the place of a query from where the padded row ends, which must be a slot.
            if count and count < q_len and q_len > room:
                raise CacheFull("q_len", q_len, room, f"slots of row {row}, padding included")
        everywhere = [0] * storage.batch
        for row, count in zip(rows, counts, strict=True):
            everywhere[row] = count
        storage.allocate(everywhere)
        device = storage.cache_seqlens.device
        if everywhere != self._counts:
            self._counts = everywhere
            self._counts_on_device.copy_(upload(everywhere, device))
        self._in_use = storage.batch if opened else len(rows)
        index = None if _neighbours(rows) else upload(rows, device).to(torch.int32)
        self.step = Step(rows, q_len, before, opened, index)
        return self.step

    def _begin_unopened(self, k: Tensor) -> Step:
        if k.is_cuda and torch.cuda.is_current_stream_capturing():
            why = "the host's part cannot be captured: open a step around the capture, and around each replay"
            raise Unsupported("a step of a FlashCache that begins inside of a captured CUDA graph", (why,))
        batch, _, q_len, _ = k.shape
        return self._begin(range(batch), [q_len] * batch, q_len, opened=False)

    def _launch(self, step: Step) -> None:
        """The device's part: tokens count from here on, for all layers."""
        self.storage.advance(self._counts_on_device)
        step.views = self._views_of(step)

    def _views_of(self, step: Step) -> list[KVCache]:
        """What the layers read, counted from where the step began: so padding does not move the queries."""
        if step.index is not None:
            starts = self.storage.starts.index_select(0, step.index)
            return [
                dataclasses.replace(
                    self.storage.view(layer),
                    cache_seqlens=starts,
                    cache_batch_idx=step.index,
                    new_tokens=step.q_len,
                )
                for layer in range(self.layers)
            ]
        first, last = step.rows[0], step.rows[-1]
        key = (first, last, step.q_len)
        if self._views[0] != key:  # the tensors are always the same: a loop of decoding makes them once
            window = slice(first, last + 1)
            starts = self.storage.starts[window]
            views = [self.storage.view(layer, window) for layer in range(self.layers)]
            views = [dataclasses.replace(v, cache_seqlens=starts, new_tokens=step.q_len) for v in views]
            self._views = (key, views)
        return self._views[1]

    def _chosen(self, rows: slice | Sequence[int] | None) -> Sequence[int]:
        every = range(self.storage.batch)
        chosen = every if rows is None else every[rows] if isinstance(rows, slice) else list(rows)
        if not chosen or len(set(chosen)) < len(chosen) or any(row not in every for row in chosen):
            raise InvalidInput("rows", rows, f"different rows from 0 to {every[-1]}, one or more")
        return chosen

    def _check_order(self, layer: int) -> None:
        expected = 0 if self.step is None else self.step.layer
        if layer == expected:
            return
        if layer == 0 and self.step is not None and not self.step.opened:
            raise InvalidInput("layer_idx", *self._half_way())
        wanted = f"{expected}: layers come in order" if expected < self.layers else "one forward a step"
        raise InvalidInput("layer_idx", layer, wanted)

    def _check(self, name: str, x: Tensor, storage: Tensor) -> None:
        heads, head_dim = storage.shape[3:]
        shape = tuple(x.shape)
        if x.ndim != 4 or (shape[1], shape[3]) != (heads, head_dim) or not shape[2]:
            raise InvalidInput(
                name, shape, f"(batch, {heads}, q_len, {head_dim}), as the configuration has it"
            )
        if x.stride(3) != 1:
            raise InvalidInput(name, f"strides {x.stride()}", "a contiguous last dimension (stride 1)")
        if x.dtype != storage.dtype or x.device != storage.device:
            wanted = f"{storage.dtype} on {storage.device}, as the cache: FlashCache(..., dtype=, device=)"
            raise InvalidInput(name, f"{x.dtype} on {x.device}", wanted)
        if x.requires_grad and torch.is_grad_enabled():
            raise Unsupported(f"backward through {name}", ("forward only: call under torch.no_grad()",))
        if self.step is not None:
            if (shape[0], shape[2]) != (len(self.step.rows), self.step.q_len):
                rows, q_len = len(self.step.rows), self.step.q_len
                wanted = f"({rows}, {heads}, {q_len}, {head_dim}): rows and q_len of the step"
                raise InvalidInput(name, shape, wanted)
        elif shape[0] > self.storage.batch or (any(self.storage.lengths) and shape[0] != self._in_use):
            held = f"{self._in_use} rows, which hold tokens (reset() empties them)"
            wanted = held if any(self.storage.lengths) else f"at most {self.storage.batch} rows, its batch"
            raise InvalidInput(name, f"a batch of {shape[0]}", wanted)


def _neighbours(rows: Sequence[int]) -> bool:
    return list(rows) == list(range(rows[0], rows[0] + len(rows)))
