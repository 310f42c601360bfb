"""Whole models under a CUDA graph, at the speed of memory."""

from flash_decoding.decoder.decoder import Decoder

__all__ = ["Decoder"]
