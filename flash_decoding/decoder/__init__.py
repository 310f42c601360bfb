"""Whole models under a CUDA graph, at the speed of memory."""
