"""The columns of the attention suites, in the order of the table. A new one is one more name here."""

from __future__ import annotations

import torch

from flash_decoding.bench.baselines import ours, peers, pytorch
from flash_decoding.bench.baselines.floor import floor_column
from flash_decoding.bench.column import Column


def attention_columns(device: torch.device) -> tuple[Column, ...]:
    """All contenders on a device; each says itself where it does not run."""
    return (
        pytorch.EAGER,
        pytorch.UNSPLIT,
        *pytorch.SDPA,
        *peers.PEERS,
        ours.UNSPLIT,
        ours.PLANNED,
        floor_column(device),
    )


def serving_columns(device: torch.device) -> tuple[Column, ...]:
    """The contenders where the kinds of work differ; what batch invariance costs stands beside ours."""
    return (
        pytorch.EAGER,
        pytorch.UNSPLIT,
        *pytorch.SDPA,
        *peers.PEERS,
        ours.PLANNED,
        ours.INVARIANT,
        floor_column(device),
    )
