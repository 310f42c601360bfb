"""Transformers' models on this library: an attention implementation, and a cache made for it.

::

    import flash_decoding.transformers

    flash_decoding.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="flash_decoding")
"""

from __future__ import annotations

import importlib.util

from flash_decoding.errors import MissingDependency

if importlib.util.find_spec("transformers") is None:
    raise MissingDependency("transformers", 'pip install "flash-decoding[transformers]"')

from flash_decoding.transformers.cache import FlashCache
from flash_decoding.transformers.registration import register

__all__ = ["FlashCache", "register"]
