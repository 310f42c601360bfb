"""Who can run a problem: rows of data, each with the reasons why it cannot. The first without any runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flash_decoding.errors import Unsupported
from flash_decoding.plan.hardware import Hardware
from flash_decoding.spec import Problem

SDPA_MIN_ROWS = 256
"""Packed query rows from which a dense, plain problem is bound by arithmetic, where SDPA's kernels excel."""


@dataclass(frozen=True)
class Variant:
    """A way to run a problem: its name, what it is, and why it would not do."""

    name: str
    what: str
    why_not: Callable[[Problem, Hardware], tuple[str, ...]]


def _reasons(*checks: tuple[bool, str]) -> tuple[str, ...]:
    return tuple(reason for fails, reason in checks if fails)


def _cpu_why_not(problem: Problem, hardware: Hardware) -> tuple[str, ...]:
    return _reasons((hardware.backend != "cpu", "the tensors are on a GPU"))


def _sdpa_why_not(problem: Problem, hardware: Hardware) -> tuple[str, ...]:
    shifted = problem.window_right == 0 and problem.q_len not in (1, problem.kv_len)
    return _reasons(
        (hardware.backend == "cpu", "the CPU path calls SDPA itself where it serves"),
        (
            problem.rows < SDPA_MIN_ROWS,
            f"fewer than {SDPA_MIN_ROWS} query rows: bound by memory, not arithmetic",
        ),
        (not problem.dense, "lengths, pages, padding or ragged queries are not SDPA's"),
        (not problem.plain, "windows, softcap, ALiBi and sinks are not SDPA's"),
        (shifted, "SDPA's causal mask is aligned to the first key, not to the last"),
        (problem.return_lse, "SDPA does not return the log-sum-exp"),
        (problem.element_bytes != 2, "its fast backends take fp16 and bf16"),
        (problem.head_dim != problem.head_dim_v, "its fast backends want values as wide as keys"),
    )


def _triton_why_not(problem: Problem, hardware: Hardware) -> tuple[str, ...]:
    return _reasons(
        (hardware.backend == "cpu", "Triton needs a GPU"),
        (
            hardware.backend == "cuda" and hardware.capability < (8, 0),
            f"compute capability {hardware.capability} is below 8.0",
        ),
        (problem.element_bytes not in (2, 4), "the kernels take fp16, bf16 and fp32"),
        (max(problem.head_dim, problem.head_dim_v) > 256, "head_dim is above 256"),
    )


VARIANTS = (
    Variant("cpu", "PyTorch operators on the CPU", _cpu_why_not),
    Variant("sdpa", "PyTorch's scaled_dot_product_attention", _sdpa_why_not),
    Variant("triton", "this library's Triton kernels", _triton_why_not),
)


def choose_variant(problem: Problem, hardware: Hardware, *, needs_splits: bool) -> Variant:
    """First variant that can run the problem; ``needs_splits`` rules out those that know none.

    Raises:
        Unsupported: none can; the message lists every variant's reasons.
    """
    refused = []
    for variant in VARIANTS:
        reasons = variant.why_not(problem, hardware)
        if needs_splits and variant.name == "sdpa":
            reasons += ("splits were asked for",)
        if not reasons:
            return variant
        refused.append(f"{variant.name}: {'; '.join(reasons)}")
    raise Unsupported(f"attention of {problem} on {hardware.name}", tuple(refused))
