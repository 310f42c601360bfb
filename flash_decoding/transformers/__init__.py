"""Transformers' models on this library: an attention implementation, and a cache made for it."""
