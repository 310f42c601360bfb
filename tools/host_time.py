"""Microseconds of host time per eager call: how long Python is busy before the GPU has its work.

On a GPU everything is real, with PyTorch's attention beside it. Without one, Triton compiles for an H200 and
a stand-in for its driver launches nothing: the driver's own share of a launch is left out.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from triton.runtime import driver

from flash_decoding import append_kv, decode_attention, eager, ops, repeats, validate
from flash_decoding.flash_attn import flash_attn_with_kvcache
from flash_decoding.plan import Hardware
from flash_decoding.spec import KVCache, Options, Queries
from tests.offline_compile import TARGETS
from tests.offline_repeat import Recorder, RecordingDriver

CALLS, ROUNDS = 200, 15
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


class SilentLauncher(Recorder):
    """Triton's own launcher, but that it launches nothing."""

    def _record(self, *_: object) -> None:
        """Take what a GPU would get."""


class SilentDriver(RecordingDriver):
    """A driver without a GPU or a record."""

    launcher_cls = SilentLauncher


def pretend() -> torch.library.Library:
    """Take CPU tensors for those of an H200, as long as what comes back is held."""
    target, gpu = TARGETS["sm_90"]
    driver.set_active(SilentDriver(0, target))
    hardware = Hardware.named(gpu)
    setattr(Hardware, "of", lambda device: hardware)  # noqa: B010 - mypy would not have it otherwise
    setattr(eager, "is_on_current_gpu", lambda x: True)  # noqa: B010 - likewise
    library = torch.library.Library("flash_decoding", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("attention", ops._attention_again, "CPU", allow_override=True)  # type: ignore[no-untyped-call]
    return library


def microseconds(call: Callable[[], object]) -> float:
    """Host time of a call: the best round, since all that can disturb it makes it longer."""
    call()
    rounds = []
    gc.disable()
    for _ in range(ROUNDS):
        if ON_GPU:
            torch.cuda.synchronize()  # a full queue would make the host wait
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - start) / CALLS * 1e6)
    gc.enable()
    return min(rounds)


def stages(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed, from the whole call inwards."""

    def checks() -> tuple[Queries, KVCache, Options]:
        queries = validate.queries(q)
        return queries, validate.kv_cache(queries, k, v, cache_seqlens=seqlens), validate.options(queries)

    records = checks()
    tensors = (q, k, v, seqlens, *[None] * 7)
    numbers = (0, 0, 0, False, q.shape[-1] ** -0.5, -1, -1, 0.0, 0, False, False)

    def first() -> Tensor:
        repeats.forget()
        return ops.attention(*records, return_lse=False)[0]

    yield "operator, first call of a kind (compiled)", first
    known_by = ("attention", *numbers)
    types = (*map(type, tensors), *map(type, known_by))
    kind, addresses = repeats.kind_of(tensors, known_by)
    steps = repeats.find(kind)

    def found() -> object:
        return repeats.find(repeats.kind_of_present((q, k, v, seqlens), known_by, types)[0])

    yield "decode_attention", lambda: decode_attention(q, k, v, cache_seqlens=seqlens, causal=False)
    yield "  whether it is alone", lambda: eager.is_unwatched(q)
    yield "  kind, and what was kept of it", found
    if steps is not None:
        yield "  outputs, scratch, launches", lambda: steps(addresses)
    yield "checks and records, where they are due", checks
    yield "attention on checked records", lambda: ops.attention(*records, return_lse=False)
    yield "the same, dispatched", lambda: torch.ops.flash_decoding.attention.default(*tensors, *numbers)
    if ON_GPU:
        new = k[:, :1].clone()
        wide_q, wide_k, wide_v = (x.transpose(1, 2) for x in (q, k, v))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        yield "append_kv", lambda: append_kv(new, new, k, v, cache_seqlens=seqlens)
        yield "flash_attn_with_kvcache", lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens)
        yield "F.scaled_dot_product_attention", lambda: sdpa(wide_q, wide_k, wide_v, enable_gqa=True)


def main() -> None:
    """Print the table, for a call whose keys are not split and one whose keys are."""
    held = None if ON_GPU else pretend()
    for batch, capacity in ((64, 256), (1, 4096)):
        q = torch.zeros(batch, 1, 32, 128, dtype=torch.bfloat16, device=DEVICE)
        k, v = (q.new_zeros(batch, capacity, 8, 128) for _ in range(2))
        seqlens = torch.full((batch,), capacity // 2, dtype=torch.int32, device=DEVICE)
        sys.stdout.write(f"batch {batch}, capacity {capacity}: microseconds of host time on {DEVICE}\n")
        for name, call in stages(q, k, v, seqlens):
            sys.stdout.write(f"  {name:44s}{microseconds(call):8.1f}\n")
    del held


if __name__ == "__main__":
    main()
