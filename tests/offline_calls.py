"""Make public calls over and over without a GPU, and compare what the driver is handed each time.

Run as a script, in a process of its own: ``python -m tests.offline_calls`` prints one JSON record per call, which is
made right after another that is nearly the same, then as if it were the first of its kind, then again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

import flash_decoding as fd
from flash_decoding import calls, eager, repeats
from flash_decoding.plan import Hardware
from tests.offline_compile import TARGETS
from tests.offline_repeat import FRESH, HOOKS, LAUNCHES, RecordingDriver

BATCH, CAPACITY, HEADS, HEADS_KV, DIM = 2, 4096, 8, 2, 64
Launches = list[tuple[str, dict[str, Any]]]


def pretend() -> None:
    """Take CPU tensors for those of an H200."""
    target, gpu = TARGETS["sm_90"]
    hardware = Hardware.named(gpu)
    driver.set_active(RecordingDriver(0, target))
    setattr(Hardware, "of", lambda device: hardware)  # noqa: B010 - mypy would not have it otherwise
    setattr(eager, "is_on_current_gpu", lambda x: True)  # noqa: B010 - likewise


def shifted(x: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of 16."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return room.copy_(x)


def given(**other: Any) -> dict[str, Any]:
    """Arguments of a call that splits, ``other`` in place of its own."""
    k, v = (torch.zeros(BATCH, CAPACITY, HEADS_KV, DIM, dtype=torch.bfloat16) for _ in range(2))
    q = torch.zeros(BATCH, 1, HEADS, DIM, dtype=torch.bfloat16)
    lengths = torch.ones(BATCH, dtype=torch.int32)
    return {"q": q, "k_cache": k, "v_cache": v, "cache_seqlens": lengths} | other


def wide(x: Tensor) -> Tensor:
    """The same with other strides."""
    return torch.cat((x, x), dim=2)[:, :, : x.shape[2]]


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Calls that could be taken for the plain one, and are not or are."""
    own = given()
    for name in own:
        yield f"{name} elsewhere", given(**{name: own[name].clone()})
        yield f"{name} not aligned", given(**{name: shifted(own[name])})
    for name in ("q", "k_cache", "v_cache"):
        yield f"{name} strided", given(**{name: wide(own[name])})
    yield "batch of 1", given(**{name: x[:1] for name, x in own.items()})
    yield "batch of 1 of many", given(q=own["q"][:1], cache_seqlens=own["cache_seqlens"][:1])
    yield "batch of 16", given(**{name: torch.cat([x] * 8) for name, x in own.items()})
    yield (
        "capacity of 4097",
        given(**{n: torch.cat((own[n], own[n][:, :1]), 1) for n in ("k_cache", "v_cache")}),
    )
    yield "capacity of 1", given(**{name: own[name][:, :1] for name in ("k_cache", "v_cache")})
    yield "float16", given(**{name: own[name].half() for name in ("q", "k_cache", "v_cache")})
    yield "lse", given(return_lse=True)
    yield "scale 1", given(softmax_scale=1)
    yield "window", given(window_size=(1, 0))
    yield "splits", given(num_splits=3)
    yield "one split", given(num_splits=1)
    yield "invariant", given(batch_invariant=True)
    yield "padded", given(cache_leftpad=torch.zeros(BATCH, dtype=torch.int32))
    yield "rows", given(cache_batch_idx=torch.zeros(BATCH, dtype=torch.int32))
    yield "masked", given(key_mask=torch.ones(BATCH, CAPACITY, dtype=torch.bool))
    yield "sinks", given(sinks=torch.nn.Parameter(torch.zeros(HEADS), requires_grad=False))
    yield "sinks not aligned", given(sinks=shifted(torch.zeros(HEADS)))
    yield "alibi", given(alibi_slopes=torch.zeros(HEADS))
    pool = {name: own[name].view(-1, 16, HEADS_KV, DIM) for name in ("k_cache", "v_cache")}
    yield "paged", given(**pool, block_table=torch.zeros(BATCH, 256, dtype=torch.int32))


def launched(call: Callable[[], object]) -> Launches:
    """What a call hands to the driver."""
    LAUNCHES.clear()
    call()
    return LAUNCHES.copy()


def differing(ours: Launches, theirs: Launches) -> list[str]:
    """Names of what two calls with the same tensors hand over differently, but for what they allocate."""
    if [kernel for kernel, _ in ours] != [kernel for kernel, _ in theirs]:
        return ["kernels"]
    return [
        name
        for (_, a), (_, b) in zip(ours, theirs, strict=True)
        for name in a
        if name not in (*FRESH, *HOOKS) and a[name] != b[name]
    ]


def records() -> Iterator[dict[str, Any]]:
    """Per variant: what differed after the plain call, and when made again with so many checks."""
    checked: list[int] = []
    checks = calls._checked

    def count(*args: Any, **options: Any) -> Any:
        checked.append(1)
        return checks(*args, **options)

    setattr(calls, "_checked", count)  # noqa: B010 - mypy would not have it otherwise
    for name, arguments in variants():

        def call(arguments: dict[str, Any] = arguments) -> object:
            return fd.decode_attention(**arguments)

        repeats.forget()
        fd.decode_attention(**given())
        after = launched(call)
        repeats.forget()
        first = launched(call)
        checked.clear()
        again = launched(call)
        found = [*differing(after, first), *differing(again, first)]
        yield {"call": name, "launches": len(first), "differs": found, "checked": len(checked)}


def hooked() -> dict[str, Any]:
    """Whether a hook that comes when launches are being repeated hears of each."""
    arguments = given()
    fd.decode_attention(**arguments)
    heard: list[object] = []
    hook = heard.append
    knobs.runtime.launch_enter_hook.add(hook)
    told = launched(lambda: fd.decode_attention(**arguments))
    knobs.runtime.launch_enter_hook.remove(hook)
    silent = launched(lambda: fd.decode_attention(**arguments))
    names = [launch["metadata"]["name"] for _, launch in told]
    enters = [launch["enter"] is knobs.runtime.launch_enter_hook for _, launch in told]
    return {"hooked": names, "enters": enters, "silent": [launch["enter"] for _, launch in silent]}


def main() -> None:
    """Print a record per variant, and one of the hooks."""
    pretend()
    for record in (*records(), hooked()):
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
