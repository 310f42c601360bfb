"""A long prompt and a few decoding steps of one attention layer."""

import torch

from flash_decoding import ContiguousCache, append_kv, decode_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
cache = ContiguousCache(batch=1, capacity=65536, heads_kv=2, head_dim=128, device=device)
for tokens in (60000, 1, 1, 1):  # the prompt, then one token after the other
    k, v = torch.randn(2, 1, tokens, 2, 128, dtype=torch.bfloat16, device=device)
    q = torch.randn(1, 1, 16, 128, dtype=torch.bfloat16, device=device)
    cache.allocate(tokens)
    cache.advance(tokens)
    append_kv(k, v, **cache.writing())
    out = decode_attention(q, **cache.reading())
    print(f"{cache.lengths[0]} keys -> {tuple(out[0].shape)}")
