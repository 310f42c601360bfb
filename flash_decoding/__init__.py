"""Flash-Decoding: attention of new tokens over long KV caches, at the speed of memory.

Needs PyTorch; Triton runs the kernels where there is a GPU. See :mod:`flash_decoding.spec` for the legend of
names and shapes, :mod:`flash_decoding.flash_attn` for flash-attn's own signatures.
"""

from __future__ import annotations

from flash_decoding.api import (
    append_kv,
    decode_attention,
    decode_attention_varlen,
    merge_attention,
    warmup,
)
from flash_decoding.cache import ContiguousCache, PagedCache
from flash_decoding.errors import CacheFull, FlashDecodingError, InvalidInput, MissingDependency, Unsupported
from flash_decoding.plan import explain

__version__ = "0.1.0"

__all__ = [
    "CacheFull",
    "ContiguousCache",
    "FlashDecodingError",
    "InvalidInput",
    "MissingDependency",
    "PagedCache",
    "Unsupported",
    "append_kv",
    "decode_attention",
    "decode_attention_varlen",
    "explain",
    "merge_attention",
    "warmup",
]
