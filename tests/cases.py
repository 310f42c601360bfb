"""One case per feature of attention over a cache, and its edges: small enough for every path to run all."""

from __future__ import annotations

from tests.inputs import Case

CASES = [
    Case(name="plain", heads_q=4, heads_kv=4, capacity=20),
    Case(name="grouped", heads_q=6, heads_kv=2, seqlens=(3, 64), q_len=2),
    Case(name="known to be full", dense=True, q_len=2),
    Case(name="causal", causal=True, q_len=5, seqlens=(30, 7)),
    Case(name="causal, more queries than keys", causal=True, q_len=6, seqlens=(2, 0)),
    Case(name="window", window=(4, 2), q_len=3, seqlens=(40, 5)),
    Case(name="window and causal", window=(4, -1), causal=True, q_len=3, seqlens=(40, 5)),
    Case(name="window of the right", window=(-1, 3), q_len=9, seqlens=(40, 5)),
    Case(name="softcap", softcap=1.5),
    Case(name="alibi", alibi="heads", q_len=3),
    Case(name="alibi of each sequence, causal", alibi="batch", q_len=3, causal=True),
    Case(name="sinks", sinks=True, q_len=2, seqlens=(0, 9)),
    Case(name="everything", alibi="batch", sinks=True, softcap=2.0, window=(9, 1), q_len=4, seqlens=(33, 2)),
    Case(name="value head_dim", head_dim=24, head_dim_v=40, softmax_scale=0.3),
    Case(name="new tokens beyond capacity", seqlens=(10, 62), new_tokens=4),
    Case(name="left padding", leftpad=(3, 20), seqlens=(9, 20), causal=True, q_len=2),
    Case(name="rows by index", batch_idx=True, seqlens=(9, 20)),
    Case(name="paged", page_size=7, seqlens=(9, 20)),
    Case(name="paged, all", page_size=1, batch_idx=True, leftpad=(2, 0), seqlens=(9, 20), new_tokens=2),
    Case(name="ragged", batch=4, q_lens=(3, 0, 1, 8), seqlens=(5, 6, 64, 7), causal=True, page_size=4),
    Case(name="packed keys", batch=3, q_lens=(3, 2, 4), seqlens=(5, 0, 64), packed=True, causal=True),
    Case(name="heads first in memory", layout="bhsd", batch=3, q_len=2),
    Case(name="wider rows in memory", layout="padded", batch=3, q_len=2, page_size=8),
]
