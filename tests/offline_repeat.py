"""Make calls twice without a GPU, and compare what the driver is handed: by Triton's launch, and by a repeat.

Run as a script, in a process of its own, as :mod:`tests.offline_compile`: ``python -m tests.offline_repeat``
prints one JSON record per launch of a call that was made again with other tensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler.compiler import LazyDict
from triton.runtime import driver

from flash_decoding import execute, repeats
from flash_decoding.kernels import append
from flash_decoding.kernels.repeat import SCRATCH, Chain
from flash_decoding.plan import Hardware
from flash_decoding.spec import KVCache, NewTokens, Options, Queries, Rotary
from tests.offline_compile import CASES, TARGETS, Case, OfflineDriver, plan_of, tensors

FRESH = ("out_ptr", "lse_ptr", "parts_ptr", "part_lse_ptr", "final_ptr", "final_lse_ptr")
"""Arguments that every call allocates anew."""

HOOKS = ("metadata", "enter", "exit", "direct")
"""What a repetition leaves out where no hook listens, and that it goes past the launcher then."""

LAUNCHES: list[tuple[str, dict[str, Any]]] = []


class Recorder(CudaLauncher):  # type: ignore[misc]  # Triton has no types
    """Triton's own launcher, but that it writes down the kernel and all that would be given to the driver."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.kernel, self.names = src.fn.fn.__name__, src.fn.arg_names
        self.compiled_for = f"{src.signature} {src.constants} {src.attrs}"
        self.num_ctas = 1
        for name in (*SCRATCH, "global_scratch_align", "profile_scratch_align"):
            setattr(self, name, getattr(metadata, name, 0))
        self.launch_cooperative_grid, self.launch_pdl = metadata.launch_cooperative_grid, metadata.launch_pdl
        # Since Triton 3.7 what is known of the arguments goes with them, not into a launcher of its own.
        self.arg_annotations, self.kernel_signature, self.gsan_enabled = (), b"", False
        self.asked, self.launch = False, self._record

    def __call__(self, *given: object) -> None:
        """Launch as Triton does."""
        self.asked = True
        super().__call__(*given)
        self.asked = False

    def _record(self, *given: object) -> None:
        """Keep what a GPU would get; tensors by where they lie, as the driver takes them."""
        front, hooks = ("x", "y", "z", "stream", "function"), ("packed", "metadata", "enter", "exit")
        is_packed = isinstance(given[-1], tuple) and len(given[-1]) == len(self.names)  # since Triton 3.7
        given = (*given[:-1], *given[-1]) if is_packed else given  # type: ignore[misc]  # a tuple
        own = len(given) - len(front) - len(hooks) - len(self.names)
        options, early = [f"option {number}" for number in range(own)], 2 if is_packed else own
        names = (*front, *options[:early], *hooks, *options[early:], *self.names)
        named = dict(zip(names, [_plain(x) for x in given], strict=True))
        named |= {"compiled for": self.compiled_for, "direct": not self.asked}
        LAUNCHES.append((self.kernel, named))


def _plain(x: object) -> object:
    if isinstance(x, LazyDict):  # what hooks are told of a launch
        return x.data
    return x.data_ptr() if isinstance(x, Tensor) else x


class RecordingDriver(OfflineDriver):
    """A driver that loads any kernel and launches none."""

    launcher_cls: Any = Recorder

    @property
    def utils(self) -> RecordingDriver:
        """What Triton asks about the device and its modules."""
        return self

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Shared memory without end."""
        return {"max_shared_mem": 1 << 30}

    def load_binary(self, name: str, *_: object) -> tuple[object, ...]:
        """Module, function, registers, spills, threads."""
        return name, name, 0, 0, 1024


def call_of(case: Case, queries: Queries, cache: KVCache, options: Options) -> tuple[Any, ...]:
    """The same as arguments of the operator."""
    return (
        *(queries.q, cache.k, cache.v, cache.cache_seqlens, cache.block_table, cache.cache_batch_idx),
        *(cache.cache_leftpad, cache.key_mask, queries.cu_seqlens_q, options.alibi_slopes, options.sinks),
        *(queries.max_q_len, cache.max_kv_len, cache.new_tokens, cache.dense, options.softmax_scale),
        *(options.window_left, options.window_right, options.softcap, case.num_splits, False, True),
    )


def kind_of(call: tuple[Any, ...]) -> tuple[repeats.Kind, repeats.Addresses]:
    """Of the arguments of an operator."""
    return repeats.kind_of(call[:11], call[11:])


def attention_twice(case: Case, hardware: Hardware) -> None:
    """A call and its repetition, and in LAUNCHES all of the second: by Triton, then repeated."""
    first, second = tensors(case), tensors(case)
    kind, _ = kind_of(call_of(case, *first))
    plan = plan_of(case, first, hardware)
    execute.run_kernels(*first, plan, kind=kind)
    again = call_of(case, *second)
    kind_again, addresses = kind_of(again)
    if kind_again != kind:
        raise AssertionError(f"{case.name}: a call like the first is not of its kind")
    LAUNCHES.clear()
    execute.run_kernels(*second, plan)
    steps = repeats.find(kind)
    if steps is None:
        raise AssertionError(f"{case.name}: nothing was kept")
    half = len(LAUNCHES)
    out, lse = steps(addresses)
    last = LAUNCHES[-1][1]
    if (last["out_ptr"], last["lse_ptr"]) != (out.data_ptr(), lse.data_ptr()):
        raise AssertionError(f"{case.name}: the results are not what the last kernel writes")
    if len(LAUNCHES) > half + 1:
        attending = LAUNCHES[half][1]
        if attending["out_ptr"] != last["parts_ptr"]:
            raise AssertionError(f"{case.name}: the combine does not read what attention wrote")
        if (attending.get("final_ptr"), attending.get("final_lse_ptr")) not in {
            (None, None),
            (out.data_ptr(), lse.data_ptr()),
        }:
            raise AssertionError(f"{case.name}: whole sequences are not written to the results")


def append_twice(case: Case, hardware: Hardware) -> None:
    """The same for an append with rotation."""
    calls = []
    for _ in range(2):
        queries, cache, _ = tensors(case)
        k = torch.empty(1, 1, case.heads[1], case.head_dim, dtype=case.dtype)
        v = torch.empty(1, 1, case.heads[1], case.head_dim_v, dtype=case.dtype)
        cos, sin = (torch.empty(4096, case.head_dim // 4, dtype=case.dtype) for _ in range(2))
        new = NewTokens(k, v, Rotary(cos, sin), queries.q, torch.empty_like(queries.q))
        placed = (cache.cache_seqlens, cache.block_table, cache.cache_batch_idx)
        call = (k, v, cache.k, cache.v, *placed, new.q, new.q_rotated, cos, sin, False, True)
        calls.append((new, cache, call))
    launched = append.launch(*calls[0][:2], overlaps=hardware.overlaps_launches)
    LAUNCHES.clear()
    append.launch(*calls[1][:2], overlaps=hardware.overlaps_launches)
    if launched is None:
        raise AssertionError(f"{case.name}: nothing was kept")
    kind, addresses = kind_of(calls[1][2])
    repeats.AppendSteps(Chain((launched, repeats.append_sources(kind))))(addresses)


def compare(case: Case) -> Iterator[dict[str, Any]]:
    """Per launch: what the second half of LAUNCHES was given that the first was not."""
    half = len(LAUNCHES) // 2
    for (kernel, ours), (repeated, again) in zip(LAUNCHES[:half], LAUNCHES[half:], strict=True):
        known = {name for name in ours if name not in (*FRESH, *HOOKS)}
        differs = [name for name in sorted(known) if ours[name] != again[name]]
        direct = (ours["direct"], again["direct"])
        yield {
            "case": case.name,
            "kernel": kernel,
            "repeated": repeated,
            "differs": differs,
            "direct": direct,
        }


def main() -> None:
    """Print a record per launch."""
    target, gpu = TARGETS["sm_90"]
    driver.set_active(RecordingDriver(0, target))
    hardware = Hardware.named(gpu)
    for case in CASES:
        if case.linear:
            continue
        attention_twice(case, hardware)
        records = list(compare(case))
        if case.q_len == 1:
            append_twice(case, hardware)
            records += compare(case)
        for record in records:
            sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
