"""The planner: plain numbers in, an immutable plan out. No tensor and no device is touched here."""

from __future__ import annotations

from flash_decoding.plan.ahead import plans_ahead
from flash_decoding.plan.explain import Explanation, explain
from flash_decoding.plan.fixed import invariant_tiles
from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.planner import make_plan

__all__ = ["Explanation", "Hardware", "explain", "invariant_tiles", "make_plan", "plans_ahead"]
