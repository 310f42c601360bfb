"""Caches as pages, for libraries that know no others."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_decoding.bench.cases import Case
from flash_decoding.bench.inputs import Inputs

PAGE = 16
"""Tokens per page of a contiguous cache that is seen as pages."""


@dataclass(frozen=True, eq=False)
class Pages:
    """A cache as pages; a contiguous one as pages of :data:`PAGE` in order, without a copy."""

    k: Tensor
    """(pages, size, heads_kv, head_dim)."""
    v: Tensor
    table: Tensor
    """(batch, max_pages) int32."""
    lengths: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.k.shape[1]

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Pages:
        """The pages of one input set."""
        if inputs.block_table is not None:
            return cls(inputs.k, inputs.v, inputs.block_table, case.live)
        k, v = (x.view(-1, PAGE, *x.shape[2:]) for x in (inputs.k, inputs.v))
        table = torch.arange(k.shape[0], dtype=torch.int32, device=k.device).view(case.batch, -1)
        return cls(k, v, table, case.live)

    def in_a_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each sequence's pages start, the pages one after the other, and tokens in each last page."""
        counts = [-(-length // self.size) for length in self.lengths]
        starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        owned = [row[:count] for row, count in zip(self.table, counts, strict=True)]
        last = torch.tensor([(length - 1) % self.size + 1 for length in self.lengths], dtype=torch.int32)
        device = self.k.device
        return starts.to(device), torch.cat(owned), last.to(device)
