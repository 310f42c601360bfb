"""A process whose first use of the library is compiled: ``python compile_first_call.py BACKEND DEVICE``.

Ends with status 0 if compiled and eager calls agree, caches included, and if compiled appends write to the
caller's memory. No part of the library runs before the compiled call: fakes and schemas alone have to do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import flash_decoding as fd
from flash_decoding.flash_attn import flash_attn_with_kvcache
from flash_decoding.spec import KVCache, NewTokens

Tensors = list[Tensor]


def inputs(device: str) -> Tensors:
    """q, k_cache, v_cache, cache_seqlens, k, v, rotary_cos, rotary_sin."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, pool_k, pool_v, cos, sin = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in ((2, 2, 4, 32), *[(2, 2, 2, 32)] * 2, *[(2, 24, 2, 32)] * 2, *[(24, 8)] * 2)
    )
    lengths = torch.tensor([5, 20], dtype=torch.int32, device=device)
    return [q, pool_k, pool_v, lengths, k, v, cos, sin]


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """Attention alone, its query an intermediate value, and a length that is an int."""
    out, lse = fd.decode_attention(q * 2, k_cache, v_cache, cache_seqlens=lengths, return_lse=True)
    again = fd.decode_attention(q, k_cache, v_cache, cache_seqlens=7)
    assert isinstance(again, Tensor)
    return out + again, lse


def append(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *new: Tensor
) -> tuple[Tensor, Tensor]:
    """An append, then attention to what it wrote."""
    k, v, cos, sin = new
    turned = fd.append_kv(k, v, k_cache, v_cache, cache_seqlens=lengths, q=q, rotary_cos=cos, rotary_sin=sin)
    assert turned is not None
    out, lse = fd.decode_attention(turned, k_cache, v_cache, cache_seqlens=lengths + 2, return_lse=True)
    return out, lse


def kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *new: Tensor
) -> tuple[Tensor, Tensor]:
    """flash-attn's call, which does both."""
    k, v, cos, sin = new
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, lengths, causal=True, return_softmax_lse=True
    )
    return out, lse


def mismatches(call: Callable[..., tuple[Tensor, Tensor]], backend: str, device: str) -> Iterator[str]:
    """What differs between the compiled and the eager call, results first, then what they wrote."""
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    given, expected = inputs(device), inputs(device)
    results = zip(compiled(*given), call(*expected), strict=True)
    for place, (ours, theirs) in enumerate([*results, *zip(given, expected, strict=True)]):
        # Around the operators there are a doubling and one addition: the same bits, however they are fused.
        if not torch.equal(ours, theirs):
            yield f"{call.__name__}, {backend}: tensor {place} differs by {(ours - theirs).abs().max()}"


def copies(device: str) -> Iterator[str]:
    """Whether Inductor copies a cache to append to it: the operator then sees memory of nobody's."""
    from flash_decoding import execute, repeats

    seen: list[int] = []
    write = execute.append_kv

    def spy(new: NewTokens, cache: KVCache, **_: object) -> None:
        seen.extend((cache.k.data_ptr(), cache.v.data_ptr()))
        write(new, cache)

    execute.append_kv = spy
    repeats.forget()  # calls like those before would not come to the spy
    given = inputs(device)
    torch.compile(kvcache, fullgraph=True, backend="inductor", dynamic=False)(*given)
    if seen != [given[1].data_ptr(), given[2].data_ptr()]:
        yield "the compiled append wrote to a copy of the cache"


def main(backend: str, device: str) -> int:
    """Run every check; the status of the process."""
    found = [text for call in (attend, append, kvcache) for text in mismatches(call, backend, device)]
    found += copies(device) if backend == "inductor" else ()
    sys.stderr.write("\n".join(found))
    return len(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
