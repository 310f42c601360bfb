"""Make public calls over and over without a GPU, and compare what the driver is handed each time.

Run as a script, in a process of its own: ``python -m tests.offline_calls`` prints a JSON record per call,
made after another that is nearly the same, then as the first of its kind, then again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

import flash_decoding as fd
from flash_decoding import calls, eager, repeats
from flash_decoding.plan import Hardware
from tests.offline_compile import TARGETS
from tests.offline_repeat import FRESH, HOOKS, LAUNCHES, RecordingDriver
from tests.repeat_cases import given, variants

Launches = list[tuple[str, dict[str, Any]]]


def pretend() -> None:
    """Take CPU tensors for those of an H200."""
    target, gpu = TARGETS["sm_90"]
    hardware = Hardware.named(gpu)
    driver.set_active(RecordingDriver(0, target))
    setattr(Hardware, "of", lambda device: hardware)  # noqa: B010 - mypy would not have it otherwise
    setattr(eager, "is_on_current_gpu", lambda x: True)  # noqa: B010 - likewise


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
        direct = all(launch["direct"] for _, launch in again)
        yield {
            "call": name,
            "launches": len(first),
            "differs": found,
            "checked": len(checked),
            "direct": direct,
        }


def hooked() -> dict[str, Any]:
    """Whether a hook that comes when launches are being repeated hears of each."""
    arguments = given()
    fd.decode_attention(**arguments)
    heard: list[object] = []
    hook, usual = heard.append, knobs.runtime.launch_enter_hook
    knobs.runtime.launch_enter_hook = hook
    told = launched(lambda: fd.decode_attention(**arguments))
    knobs.runtime.launch_enter_hook = usual
    silent = launched(lambda: fd.decode_attention(**arguments))
    names = [launch["metadata"]["name"] for _, launch in told]
    enters = [launch["enter"] is hook for _, launch in told]
    quiet = [[launch["enter"], launch["direct"]] for _, launch in silent]
    return {"hooked": names, "enters": enters, "silent": quiet}


def refused() -> dict[str, Any]:
    """What is said of calls that are like one that was made, but for what has to be refused."""
    own = given()
    fd.decode_attention(**own, num_splits=2)
    trainable = own["q"].clone().requires_grad_()
    with torch.no_grad():
        fd.decode_attention(**own | {"q": trainable}, num_splits=2)
    reshaped = own["q"].clone()
    fd.decode_attention(**own | {"q": reshaped}, num_splits=2)
    reshaped.unsqueeze_(0)
    wrong: dict[str, dict[str, Any]] = {
        "float": {"num_splits": 2.0},
        "list": {"num_splits": [2]},
        "tensor": {"num_splits": torch.tensor(2)},
        "wide window": {"window_size": (-1, -1, -1)},
        "grad": {"q": trainable, "num_splits": 2},
        "in place": {"q": reshaped, "num_splits": 2},
        "lengths": {"cache_seqlens": [1, 2]},
        "queries": {"q": None},
    }
    LAUNCHES.clear()
    return {
        "refused": {name: said_of(own | other) for name, other in wrong.items()},
        "launched": len(LAUNCHES),
    }


def said_of(arguments: dict[str, Any]) -> str | None:
    """The kind of refusal; None where there is none."""
    try:
        fd.decode_attention(**arguments)
    except (fd.InvalidInput, fd.Unsupported) as error:
        return type(error).__name__
    return None


def main() -> None:
    """Print a record per variant, one of the hooks, and one of refusals."""
    pretend()
    for record in (*records(), hooked(), refused()):
        sys.stdout.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
