"""Requests that come and go over a pool of pages, two with a prompt in common; on a GPU, a CUDA graph.

The captured step serves every mix of requests and every length: rows without a request cost next to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_decoding import CacheFull, PagedCache, append_kv, decode_attention

HEADS_Q, HEADS_KV, HEAD_DIM, ROWS = 16, 2, 64, 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)


def prefill(cache: PagedCache, row: int, tokens: int) -> None:
    """Put a prompt into a row; its attention would run here too, with a q of as many tokens."""
    cache.allocate(tokens, row)
    cache.advance(tokens, row)
    append_kv(random(1, tokens, HEADS_KV), random(1, tokens, HEADS_KV), **cache.writing(rows=row))


class Step:
    """One decoding step of all rows, captured where there is a GPU."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self.q, self.k, self.v = (random(ROWS, 1, heads) for heads in (HEADS_Q, HEADS_KV, HEADS_KV))
        self.graph = torch.cuda.CUDAGraph() if DEVICE == "cuda" else None
        self.out = self.run()
        if self.graph is not None:
            with torch.cuda.graph(self.graph):
                self.out = self.run()

    def run(self) -> Tensor:
        self.cache.advance()
        append_kv(self.k, self.v, **self.cache.writing())
        out = decode_attention(self.q, **self.cache.reading())
        assert isinstance(out, Tensor)
        return out

    def __call__(self) -> Tensor:
        """Room for a token of each request first, on the host; then the step itself."""
        self.cache.allocate([int(row in self.cache.live_rows) for row in range(ROWS)])
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.out


def main() -> None:
    cache = PagedCache(24, 16, HEADS_KV, HEAD_DIM, max_batch=ROWS, max_pages=16, device=DEVICE)
    step = Step(cache)  # no row is live yet, so nothing counts
    prefill(cache, 0, 100)
    cache.fork(0, 1)  # the same prompt, a second answer: full pages are shared
    prefill(cache, 2, 30)
    for _ in range(20):
        out = step()
    print(f"rows {cache.live_rows} hold {cache.lengths} tokens, {cache.free_pages} pages are free")
    cache.free(0)
    step()
    try:
        prefill(cache, 3, 16 * 16)
    except CacheFull as full:
        print(f"the next request has to wait: {full}")
    print(f"out {tuple(out.shape)}, all finite: {bool(out.isfinite().all())}")


if __name__ == "__main__":
    main()
