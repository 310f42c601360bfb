"""What a cache has to be for a model, read from the model's configuration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.configuration_utils import PretrainedConfig

from flash_decoding import validate
from flash_decoding.cache import ContiguousCache, PagedCache
from flash_decoding.cache.ledger import check_sizes
from flash_decoding.errors import InvalidInput, Unsupported

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

_OTHER_SIZES = {
    "kv_lora_rank": "latent attention has keys of another kind",
    "swa_head_dim": "layers with a window have a head_dim of their own",
    "swa_num_key_value_heads": "layers with a window have key/value heads of their own",
    "global_head_dim": "layers without a window have a head_dim of their own",
    "num_global_key_value_heads": "layers without a window have key/value heads of their own",
    "block_configs": "each layer has sizes of its own",
}
"""Fields of configurations whose layers do not all keep the same kind of keys and values."""


@dataclass(frozen=True)
class CacheSizes:
    """Layers of a model and what each keeps of a token."""

    layers: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype | None) -> CacheSizes:
        """Read a configuration; the dtype is that of the weights if None is given.

        Raises:
            Unsupported: the model's layers do not all keep keys and values of the same sizes.
            InvalidInput: sizes that nothing here computes with.
        """
        text = config.get_text_config(decoder=True)
        reasons = _why_not(config, text)
        if reasons:
            raise Unsupported(f"a FlashCache for {config.model_type or type(config).__name__}", reasons)
        heads_q = int(text.num_attention_heads)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads_q
        heads_kv = getattr(text, "num_key_value_heads", None) or heads_q
        head_dim_v = getattr(text, "v_head_dim", None) or head_dim
        validate.sizes(heads_q=heads_q, heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v)
        kept = dtype or _dtype_of(text) or _dtype_of(config) or torch.get_default_dtype()
        return cls(int(text.num_hidden_layers), heads_kv, head_dim, head_dim_v, kept)

    @property
    def token_bytes(self) -> int:
        return self.layers * self.heads_kv * (self.head_dim + self.head_dim_v) * self.dtype.itemsize


def pages_of(capacity: int, page_size: int) -> int:
    """Pages that hold so many slots."""
    return -(-capacity // page_size)


def check_room(*, batch: int, capacity: int, page_size: int, num_pages: int | None) -> None:
    """Raise InvalidInput for sizes that no cache can have."""
    check_sizes(batch=batch, capacity=capacity, num_pages=num_pages)
    if page_size < 0:
        raise InvalidInput("page_size", page_size, "1 or more; 0 for a contiguous cache")
    if num_pages is not None and not page_size:
        raise InvalidInput("num_pages", num_pages, "a page_size to go with it, or None")


def allocate(
    sizes: CacheSizes,
    *,
    batch: int,
    capacity: int,
    page_size: int,
    num_pages: int | None,
    device: torch.device | str | None,
) -> ContiguousCache | PagedCache:
    """The storage of all layers, contiguous or paged."""
    if not page_size:
        return ContiguousCache(
            batch,
            capacity,
            sizes.heads_kv,
            sizes.head_dim,
            head_dim_v=sizes.head_dim_v,
            layers=sizes.layers,
            dtype=sizes.dtype,
            device=device,
        )
    width = pages_of(capacity, page_size)
    return PagedCache(
        num_pages or batch * width,
        page_size,
        sizes.heads_kv,
        sizes.head_dim,
        max_batch=batch,
        max_pages=width,
        head_dim_v=sizes.head_dim_v,
        layers=sizes.layers,
        dtype=sizes.dtype,
        device=device,
    )


def _why_not(config: PretrainedConfig, text: PretrainedConfig) -> tuple[str, ...]:
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("is_encoder_decoder: it caches keys of an encoder too")
    if getattr(text, "num_attention_heads", None) is None:
        reasons.append("num_attention_heads: it has none")
    if getattr(text, "num_kv_shared_layers", None):
        reasons.append(f"num_kv_shared_layers={text.num_kv_shared_layers}: layers use each other's keys")
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    others = sorted(set(kinds) - _ATTENTION)
    if others:
        reasons.append(
            f"layer_types: {', '.join(map(repr, others))} keeps no keys and values as attention does"
        )
    for field, why in _OTHER_SIZES.items():
        if getattr(text, field, None) is not None:
            reasons.append(f"{field}: {why}")
    return tuple(reasons)


def _dtype_of(config: PretrainedConfig) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None
