"""Every kernel variant compiles for every architecture, fits its shared memory, and does not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="kernels need Triton; the CPU path does without")

ATTENTION = {
    "attend_kernel",
    "attend_balanced_kernel",
    "attend_fixed_kernel",
    "combine_kernel",
    "fold_kernel",
}
HALVES = (("sm_80", "sm_86", "sm_89", "gfx942"), ("sm_90", "sm_100", "sm_120"))


def records_of(*script: str) -> list[dict[str, Any]]:
    """Records of a process of its own: here Triton may be the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("targets", HALVES, ids="+".join)
def test_variants_compile_within_shared_memory_and_registers(targets: tuple[str, ...]) -> None:
    records = records_of("tests.offline_compile", *targets)
    assert {record["target"] for record in records} == set(targets)
    kernels = ATTENTION | {"append_kernel", "linear_kernel"}
    with_roles = {"attend_roles_kernel", "balanced_roles_kernel"} if "sm_90" in targets else set()
    assert {record["kernel"] for record in records} == kernels | with_roles
    too_large = [r for r in records if r["smem"] > r["smem_limit"]]
    assert not too_large
    spilling = [
        r
        for r in records
        if r["kernel"] not in {"combine_kernel", "fold_kernel", "append_kernel"} and r["spills"]
    ]
    assert not spilling
    in_turn = [r for r in records if is_plain(r["case"]) and r.get("in_turn", 0.0) > 0.2]
    assert not in_turn
    assert any("in_turn" in r for r in records) == ("sm_90" in targets)


def is_plain(case: str) -> bool:
    """Whether sums of products are to go on side by side: all else is done to a score where its sum ends."""
    return not any(word in case for word in ("masked", "option"))


def test_a_repeated_call_hands_the_driver_what_triton_would() -> None:
    records = records_of("tests.offline_repeat")
    kernels = ATTENTION | {"append_kernel", "attend_roles_kernel", "balanced_roles_kernel"}
    assert {record["kernel"] for record in records} == kernels
    wrong = [r for r in records if r["differs"] or r["kernel"] != r["repeated"]]
    assert not wrong
    assert all(r["direct"] == [False, True] for r in records)


def test_public_calls_hand_the_driver_the_same_however_often_they_are_made() -> None:
    *calls, hooked, refused = records_of("tests.offline_calls")
    assert len(calls) > 20
    assert not [call for call in calls if call["differs"] or call["checked"] or not call["launches"]]
    assert all(call["direct"] for call in calls)
    assert {call["call"] for call in calls if call["launches"] == 1} == {"one split", "capacity of 1"}
    kernels = ["attend_roles_kernel", "combine_kernel"]
    assert hooked == {"hooked": kernels, "enters": [True, True], "silent": [[None, True]] * 2}
    assert refused["launched"] == 0
    assert refused["refused"].pop("grad") == "Unsupported"
    assert set(refused["refused"].values()) == {"InvalidInput"}
