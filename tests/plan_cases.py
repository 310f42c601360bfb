"""Problems and GPUs that the planner is asked about."""

from __future__ import annotations

import dataclasses

from hypothesis import strategies as st

from flash_decoding.plan import Hardware
from flash_decoding.plan.hardware import PRESETS
from flash_decoding.spec import Problem

H200 = Hardware.named("H200")
WITHOUT_ROLES = dataclasses.replace(H200, triton=(3, 4))
"""An H200 whose Triton gives warps no roles."""
GPUS = st.sampled_from(PRESETS)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    heads_kv = draw(st.integers(1, 16))
    return Problem(
        batch=draw(st.integers(1, 512)),
        q_len=draw(st.integers(1, 256)),
        heads_q=heads_kv * draw(st.integers(1, 16)),
        heads_kv=heads_kv,
        head_dim=8 * draw(st.integers(2, 32)),
        head_dim_v=8 * draw(st.integers(2, 32)),
        kv_len=draw(st.integers(1, 2**20)),
        element_bytes=draw(st.sampled_from((2, 4))),
        page_size=draw(st.sampled_from((0, 1, 16, 256))),
        window_left=draw(st.sampled_from((-1, 0, 128, 4096))),
        window_right=draw(st.sampled_from((-1, 0, 5))),
    )
