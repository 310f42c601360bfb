"""PyTorch's own attention, for problems bound by arithmetic that it knows: dense, plain, many query rows."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flash_decoding.spec import KVCache, Options, Queries


def attend(queries: Queries, cache: KVCache, options: Options) -> Tensor:
    """Attention of dense queries over a full contiguous cache; no copy is made, grouped heads stay grouped.

    ``plan.variants`` says what it takes; the caller has asked there.
    """
    q, k, v = (x.transpose(1, 2) for x in (queries.q, cache.k, cache.v))
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        is_causal=options.window_right == 0 and queries.q_len > 1,
        scale=options.softmax_scale,
        enable_gqa=queries.heads != cache.heads,
    )
    return out.transpose(1, 2).contiguous()
