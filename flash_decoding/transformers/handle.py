"""What a cache of ours hands to attention in place of key and value tensors."""

from __future__ import annotations

from dataclasses import dataclass

from flash_decoding.errors import Unsupported
from flash_decoding.spec import KVCache


@dataclass(frozen=True, eq=False)
class CachedKeys:
    """Where the keys and values of one layer lie, the newest tokens included.

    Transformers' layers pass on to the attention function whatever a cache's ``update`` returned. Ours
    returns this twice, as keys and as values, so that attention sees storage, lengths and pages, and reads
    live tokens only. Any other attention function meets an error that says what to do.
    """

    cache: KVCache

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)  # Python and PyTorch ask for protocols; this has none
        raise Unsupported(
            f"reading {name!r} of the keys of a FlashCache",
            ('only attn_implementation="flash_decoding" reads them: model.set_attn_implementation(...)',),
        )
