"""From the caller's tensors to the records of :mod:`flash_decoding.spec`; every refusal is raised here.

Shapes, dtypes, devices, strides and Python numbers are read, never the contents of a tensor: nothing here
waits for a device, and everything traces under ``torch.compile``. Contents are looked at in checking mode
alone (:mod:`flash_decoding.settings`).

========  ==========================================================================================
tensors   what one tensor has to be: rank, dtype, device, strides
values    what lengths, indices and page numbers have to hold (checking mode)
inputs    queries, cache, options of a call to attention
keys      keys that come with the call: dense or packed
appends   new tokens and rotary tables on their way into a cache; partial results to be merged
========  ==========================================================================================
"""

from __future__ import annotations

from flash_decoding.validate.appends import append_cache, new_len, new_tokens, partials, rotary
from flash_decoding.validate.inputs import (
    MAX_SPLITS,
    heads,
    kv_cache,
    layout,
    lengths,
    masked,
    num_splits,
    options,
    queries,
    ragged_queries,
    sizes,
)
from flash_decoding.validate.keys import dense_keys, packed_keys

__all__ = [
    "MAX_SPLITS",
    "append_cache",
    "dense_keys",
    "heads",
    "kv_cache",
    "layout",
    "lengths",
    "masked",
    "new_len",
    "new_tokens",
    "num_splits",
    "options",
    "packed_keys",
    "partials",
    "queries",
    "ragged_queries",
    "rotary",
    "sizes",
]
