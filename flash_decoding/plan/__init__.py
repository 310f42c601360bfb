"""The planner: plain numbers in, an immutable plan out. No tensor and no device is touched here."""

from __future__ import annotations

from flash_decoding.plan.explain import Explanation, explain
from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.planner import invariant_tiles, make_plan, runs_tile
from flash_decoding.plan.tiles import tiles_for

__all__ = ["Explanation", "Hardware", "explain", "invariant_tiles", "make_plan", "runs_tile", "tiles_for"]
