"""Calls that the kernels are held to: a table of the edges, and a seeded sweep over everything at once."""

from __future__ import annotations

import dataclasses
import random

import torch

from flash_decoding import execute
from flash_decoding.plan import Hardware, make_plan
from flash_decoding.spec import Plan
from tests.helpers import Case, Inputs

EDGES = (
    Case(name="one_token", capacity=100, seqlens=(1, 100)),
    Case(name="empty_among_full", batch=3, capacity=130, seqlens=(0, 130, 7)),
    Case(
        name="tile_borders", batch=6, capacity=200, seqlens=(31, 32, 33, 127, 128, 129), dtype=torch.float16
    ),
    Case(name="mha", heads_q=4, heads_kv=4, capacity=70),
    Case(name="mqa_20", heads_q=20, heads_kv=1, capacity=90, dtype=torch.bfloat16),
    Case(name="group_of_5", heads_q=10, heads_kv=2, capacity=90),
    Case(name="causal_verify", q_len=5, causal=True, capacity=150, seqlens=(150, 3)),
    Case(name="causal_more_queries_than_keys", q_len=7, causal=True, capacity=64, seqlens=(3, 0)),
    Case(name="not_causal_verify", q_len=3, capacity=80, seqlens=(80, 41)),
    Case(
        name="long_queries",
        batch=1,
        q_len=70,
        heads_q=2,
        heads_kv=1,
        causal=True,
        capacity=96,
        dtype=torch.float16,
    ),
    Case(
        name="many_rows_window",
        q_len=5,
        heads_q=16,
        heads_kv=1,
        window=(90, 1),
        capacity=300,
        dtype=torch.float16,
        seqlens=(300, 130),
    ),
    Case(
        name="many_rows_leftpad",
        q_len=5,
        heads_q=16,
        heads_kv=1,
        leftpad=(70, 5),
        capacity=300,
        dtype=torch.float16,
        seqlens=(300, 90),
    ),
    Case(name="scale_negative", softmax_scale=-0.3, q_len=2, causal=True, capacity=100, seqlens=(100, 3)),
    Case(name="scale_zero", softmax_scale=0.0, q_len=2, causal=True, capacity=100, seqlens=(100, 3)),
    Case(name="head_dim_80", head_dim=80, capacity=70),
    Case(name="head_dim_96_dv_16", head_dim=96, head_dim_v=16, capacity=70, dtype=torch.float16),
    Case(name="head_dim_112", head_dim=112, capacity=50),
    Case(name="head_dim_192_dv_128", head_dim=192, head_dim_v=128, capacity=70, dtype=torch.bfloat16),
    Case(name="head_dim_256", head_dim=256, capacity=70, dtype=torch.float16),
    Case(name="head_dim_16", head_dim=16, capacity=70),
    Case(name="head_dim_24", head_dim=24, capacity=70, dtype=torch.float16),
    Case(name="page_1", page_size=1, capacity=70, seqlens=(70, 33)),
    Case(name="page_3", page_size=3, capacity=70, seqlens=(70, 2)),
    Case(name="page_16_borders", batch=4, page_size=16, capacity=160, seqlens=(15, 16, 17, 160)),
    Case(name="page_64", page_size=64, capacity=200, seqlens=(129, 64), dtype=torch.float16),
    Case(name="page_256", page_size=256, capacity=512, seqlens=(300, 256), dtype=torch.bfloat16),
    Case(name="window", window=(20, 0), q_len=3, capacity=200, seqlens=(200, 11)),
    Case(name="window_both_sides", window=(9, 1), q_len=6, capacity=100, seqlens=(100, 5)),
    Case(name="window_of_one", window=(0, 0), capacity=100, seqlens=(100, 37), page_size=16),
    Case(name="window_right_only", window=(-1, 2), q_len=6, capacity=100),
    Case(name="softcap", softcap=5.0, capacity=70),
    Case(name="alibi_heads", alibi="heads", q_len=3, causal=True, capacity=70, seqlens=(70, 21)),
    Case(name="alibi_batch", alibi="batch", capacity=70, dtype=torch.float16),
    Case(name="sinks", sinks=True, capacity=130, seqlens=(130, 0)),
    Case(name="leftpad", leftpad=(5, 40), capacity=100, seqlens=(100, 90)),
    Case(name="leftpad_hides_all", leftpad=(50, 0), capacity=100, seqlens=(50, 90)),
    Case(name="leftpad_paged", leftpad=(5, 40), capacity=100, seqlens=(100, 90), page_size=16),
    Case(name="holes", key_mask="holes", capacity=200, seqlens=(200, 33), q_len=3, causal=True),
    Case(name="tiles_hidden", key_mask="far", batch=3, capacity=280, seqlens=(280, 250, 20)),
    Case(
        name="tiles_hidden_paged", key_mask="far", capacity=280, seqlens=(280, 275), page_size=16, sinks=True
    ),
    Case(name="mask_of_half", key_mask="short", capacity=200, seqlens=(200, 90), page_size=64),
    Case(name="mask_hides_all", key_mask="none", capacity=100, seqlens=(100, 7), dtype=torch.float16),
    Case(name="batch_idx", batch_idx=True, capacity=70, seqlens=(70, 20)),
    Case(name="batch_idx_paged", batch_idx=True, capacity=70, seqlens=(70, 20), page_size=8),
    Case(name="new_tokens", new_tokens=3, capacity=70, seqlens=(60, 69)),
    Case(
        name="ragged_queries", batch=4, q_lens=(1, 0, 5, 2), causal=True, capacity=90, seqlens=(90, 4, 30, 2)
    ),
    Case(name="packed_keys", batch=3, q_lens=(4, 1, 6), packed=True, causal=True, seqlens=(9, 0, 70)),
    Case(name="heads_first", layout="bhsd", capacity=70, seqlens=(70, 20)),
    Case(name="padded_rows", layout="padded", capacity=70, seqlens=(70, 20), dtype=torch.float16),
    Case(
        name="everything",
        q_len=4,
        heads_q=6,
        heads_kv=2,
        head_dim=80,
        head_dim_v=48,
        page_size=7,
        capacity=150,
        seqlens=(140, 33),
        leftpad=(3, 0),
        batch_idx=True,
        causal=True,
        window=(60, 0),
        softcap=8.0,
        alibi="batch",
        sinks=True,
        key_mask="holes",
    ),
)


def random_case(seed: int, *, longest: int, head_dims: tuple[int, ...]) -> Case:
    """A call drawn from all that is allowed, options in any combination."""
    rng = random.Random(seed)
    batch = rng.randint(1, 4)
    heads_kv = rng.choice((1, 2, 3))
    page_size = rng.choice((0, 0, 1, 5, 16, 64, 128))
    capacity = rng.randint(1, longest)
    slots = -(-capacity // page_size) * page_size if page_size else capacity
    seqlens = tuple(rng.choice((0, 1, slots, rng.randint(0, slots))) for _ in range(batch))
    is_ragged = rng.random() < 0.3
    return Case(
        name=f"seed_{seed}",
        batch=batch,
        q_len=rng.choice((1, 1, 2, 5, 16)),
        q_lens=(*(rng.randint(0, 9) for _ in range(batch - 1)), 1) if is_ragged else None,
        heads_kv=heads_kv,
        heads_q=heads_kv * rng.choice((1, 2, 5, 8)),
        head_dim=rng.choice(head_dims),
        head_dim_v=rng.choice((0, 0, *head_dims)),
        page_size=page_size,
        capacity=capacity,
        seqlens=seqlens,
        dtype=rng.choice((torch.float16, torch.bfloat16, torch.float32)),
        leftpad=tuple(rng.randint(0, length) for length in seqlens) if rng.random() < 0.3 else None,
        batch_idx=rng.random() < 0.3,
        layout=rng.choice(("bshd", "bhsd", "padded")),
        causal=rng.random() < 0.5,
        window=rng.choice(((-1, -1), (-1, -1), (rng.randint(0, 50), rng.randint(-1, 3)))),
        softcap=rng.choice((0.0, 0.0, 10.0)),
        alibi=rng.choice(("", "", "heads", "batch")),
        sinks=rng.random() < 0.3,
        key_mask=rng.choice(("", "", "", "holes", "short", "far")),
    )


def runnable(case: Case, device: torch.device) -> Case:
    """The case as the device can run it: Triton's interpreter multiplies the bits of bf16 as if integers."""
    if device.type == "cpu" and case.dtype == torch.bfloat16:
        return dataclasses.replace(case, dtype=torch.float16)
    return case


def plan_of(inputs: Inputs, *, num_splits: int = 0, batch_invariant: bool = False, runs: int = 0) -> Plan:
    """The plan of the Triton variant: for the GPU at hand, or a named one for interpreted kernels.

    ``runs`` > 0 asks for work shared across sequences, which the planner keeps for large caches; in whole
    splits where the plan is batch-invariant. Both are of the portable kernels.
    """
    device = inputs.queries.q.device
    hardware = Hardware.of(device) if device.type == "cuda" else Hardware.named("H200")
    if device.type == "cpu" or batch_invariant or runs:
        hardware = dataclasses.replace(hardware, triton=(3, 4))  # which gives warps no roles
    problem = execute.problem_of(*inputs, return_lse=True)
    plan = make_plan(problem, hardware, num_splits=num_splits, batch_invariant=batch_invariant)
    if runs and batch_invariant:
        plan = dataclasses.replace(plan, runs=runs, by_leaf=False)
    elif runs:
        plan = dataclasses.replace(plan, kind="flash_decoding", num_splits=runs, balanced=True)
    return plan if device.type == "cuda" else dataclasses.replace(plan, overlap=False)
