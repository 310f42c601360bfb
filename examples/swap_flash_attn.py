"""An attention module that was written for flash-attn, word for word; one import line has changed.

Before: ``from flash_attn import flash_attn_with_kvcache``. One call rotates, appends and attends, for prompts
and for single tokens alike; here it also runs in float32, and without a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flash_decoding.flash_attn import flash_attn_with_kvcache


class Attention(nn.Module):
    """Attention with grouped heads and rotary embedding over a cache of its own."""

    def __init__(self, hidden: int, heads_q: int, heads_kv: int, batch: int, capacity: int) -> None:
        super().__init__()
        self.head_dim = hidden // heads_q
        self.widths = [heads * self.head_dim for heads in (heads_q, heads_kv, heads_kv)]
        self.qkv = nn.Linear(hidden, sum(self.widths), bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        dtype = self.out.weight.dtype
        frequencies = 1e4 ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = torch.outer(torch.arange(capacity).float(), frequencies)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.k_cache, self.v_cache = torch.zeros(2, batch, capacity, heads_kv, self.head_dim)
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, q_len, hidden) in and out; the new tokens join the cache."""
        parts = self.qkv(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        heads: Any = flash_attn_with_kvcache(
            q,
            self.k_cache,
            self.v_cache,
            k,
            v,
            rotary_cos=self.cos,
            rotary_sin=self.sin,
            cache_seqlens=self.cache_seqlens,
            causal=True,
            rotary_interleaved=False,
        )
        self.cache_seqlens += x.shape[1]
        out: Tensor = self.out(heads.flatten(-2))
        return out


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        torch.set_default_dtype(torch.bfloat16)
    attention = Attention(hidden=512, heads_q=16, heads_kv=4, batch=2, capacity=256)
    x = torch.randn(2, 100, 512)
    at_once = attention(x)
    attention.cache_seqlens.zero_()
    prompt, *tokens = [attention(part) for part in torch.split(x, [80, *[1] * 20], dim=1)]
    difference = (torch.cat((prompt, *tokens), dim=1) - at_once).abs().max()
    print(
        f"{len(tokens)} tokens, one at a time, behind a prompt of {prompt.shape[1]}: {tuple(at_once.shape)}"
    )
    print(f"largest difference from all at once: {difference:.2g} of {at_once.abs().max():.2g}")


if __name__ == "__main__":
    main()
