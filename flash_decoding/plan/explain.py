"""A plan in words: which kernel, how many splits, why, bytes to move and the time that the memory allows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flash_decoding.errors import InvalidInput
from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.planner import make_plan
from flash_decoding.plan.tiles import row_tiles
from flash_decoding.plan.variants import VARIANTS
from flash_decoding.spec import UNBOUNDED, Plan, Problem

TITLES = {"flash_attention": "FlashAttention (no split)", "flash_decoding": "Flash-Decoding"}


@dataclass(frozen=True)
class Explanation:
    """What would run and why; ``str()`` of it is meant to be read."""

    problem: Problem
    hardware: Hardware
    plan: Plan

    @property
    def bytes_to_move(self) -> int:
        """Keys and values read once, queries read and outputs written, in bytes; scratch is left out."""
        p = self.problem
        per_query = (p.head_dim + p.head_dim_v) * p.heads_q * p.element_bytes
        return p.kv_bytes + p.batch * p.q_len * per_query

    @property
    def programs(self) -> int:
        """Programs of the attention kernel; 0 where another library's kernel runs."""
        if self.plan.variant != "triton":
            return 0
        p, plan = self.problem, self.plan
        of_a_head = plan.runs or plan.num_splits * (1 if plan.balanced else p.batch)
        return row_tiles(p, plan.tile.block_m) * p.heads_kv * of_a_head

    @property
    def floor_seconds(self) -> float | None:
        """Time to move the bytes at the vendor's bandwidth; None where that is not known."""
        return self.bytes_to_move / self.hardware.bandwidth if self.hardware.bandwidth else None

    def __str__(self) -> str:
        return "\n".join([self._call(), *self._decision(), *self._memory(), *self._others()])

    def _call(self) -> str:
        p = self.problem
        cache = f"pages of {p.page_size}" if p.page_size else "contiguous cache"
        return (
            f"batch {p.batch} x {p.kv_len} keys, {p.q_len} query token(s), {p.heads_q} query heads on "
            f"{p.heads_kv}, head_dim {p.head_dim}, {p.element_bytes} bytes per element, {cache}, "
            f"on {self.hardware.name}"
        )

    def _decision(self) -> list[str]:
        plan, tile = self.plan, self.plan.tile
        lines = [f"kernel   {TITLES[plan.kind]}, variant {plan.variant}"]
        if plan.variant == "triton":
            share = (
                f"up to {plan.split_tokens} keys each, more of long sequences"
                if plan.split_tokens
                else "live keys shared evenly"
            )
            lines.append(f"splits   {plan.num_splits} ({share}), {self.programs} programs")
            lines.append(
                f"tile     {tile.block_m} rows x {tile.block_n} keys, {tile.num_warps} warps, "
                f"{tile.num_stages} stages"
            )
        return lines + [f"because  {reason}" for reason in plan.reasons]

    def _memory(self) -> list[str]:
        lines = [f"bytes    {self.bytes_to_move / 2**20:.2f} MiB to move once"]
        if self.floor_seconds is not None:
            bandwidth = self.hardware.bandwidth / 1e12
            lines.append(
                f"floor    {self.floor_seconds * 1e6:.1f} us at {bandwidth:.2f} TB/s, the vendor's figure"
            )
        return lines

    def _others(self) -> list[str]:
        refused = [
            (v, v.why_not(self.problem, self.hardware)) for v in VARIANTS if v.name != self.plan.variant
        ]
        return [f"not {v.name:<5}{'; '.join(reasons)}" for v, reasons in refused if reasons]


def explain(
    *,
    batch: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    kv_len: int,
    q_len: int = 1,
    head_dim_v: int | None = None,
    dtype: str | torch.dtype = "bfloat16",
    page_size: int = 0,
    window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    causal: bool = True,
    num_splits: int = 0,
    batch_invariant: bool = False,
    gpu: str | None = None,
) -> Explanation:
    """Say what a call of these sizes would run, on any GPU, without one.

    Args:
        batch: sequences.
        heads_q: query heads; a multiple of heads_kv.
        heads_kv: key/value heads.
        head_dim: elements of a query or key vector.
        kv_len: keys per sequence (its capacity).
        q_len: query tokens per sequence.
        head_dim_v: elements of a value vector; head_dim if None.
        dtype: of queries and cache: "float16", "bfloat16", "float32" or a torch.dtype.
        page_size: tokens in a page; 0 for a contiguous cache.
        window_size: (left, right), -1 for unbounded.
        causal: bottom-right aligned.
        num_splits: 0 for the planner's choice.
        batch_invariant: fixed keys per split.
        gpu: name of a GPU ("H200"); None for this machine's device.

    Raises:
        InvalidInput: sizes that no call could have, an unknown dtype or GPU.
        Unsupported: nothing here runs such a call.
    """
    sizes = {"batch": batch, "heads_q": heads_q, "heads_kv": heads_kv, "head_dim": head_dim}
    for name, size in (sizes | {"kv_len": kv_len, "q_len": q_len}).items():
        if size < 1:
            raise InvalidInput(name, size, "at least 1")
    if heads_q % heads_kv:
        raise InvalidInput("heads_q", heads_q, f"a multiple of heads_kv = {heads_kv}")
    problem = Problem(
        batch=batch,
        q_len=q_len,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim if head_dim_v is None else head_dim_v,
        kv_len=kv_len,
        element_bytes=_dtype(dtype).itemsize,
        page_size=page_size,
        window_left=window_size[0],
        window_right=0 if causal else window_size[1],
        return_lse=False,
    )
    hardware = _this_device() if gpu is None else Hardware.named(gpu)
    plan = make_plan(problem, hardware, num_splits=num_splits, batch_invariant=batch_invariant)
    return Explanation(problem, hardware, plan)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InvalidInput("dtype", repr(dtype), '"float16", "bfloat16" or "float32"')
    return found


def _this_device() -> Hardware:
    return Hardware.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
